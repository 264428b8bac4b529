"""Programs of every Gemma against transformers, every parameter random.

The oracle is transformers' uncached float32 forward; the runs are in `parity_runs`. The nets
themselves are held against it in `test_models`, the programs of other families in `test_lowering`.
"""

from __future__ import annotations

import numpy as np
import pytest
from parity_runs import LENGTH, allowed, export, program_logits, reference
from weights_models import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_onnx_matches_transformers(name, tmp_path):
    ids, expected, noise = reference(name, tmp_path / "hf")
    assert expected.std() > 0.1  # a model that says nothing would agree with anything
    export(tmp_path / "hf", tmp_path / "out")
    for engine in ("onnx", "onnx-stock"):
        check(program_logits(tmp_path / "out", ids.numpy(), engine), expected, noise)


# An ExecuTorch export takes a minute: two families here, all of them in benchmarks/parity.py.
@pytest.mark.parametrize("name", ["e2b", "31b"])
@pytest.mark.parametrize(
    ("engine", "attention"), [("executorch", "native"), ("executorch-python", "portable")]
)
def test_executorch_matches_transformers(name, engine, attention, tmp_path):
    ids, expected, noise = reference(name, tmp_path / "hf")
    export(tmp_path / "hf", tmp_path / "out", "executorch", attention)
    check(program_logits(tmp_path / "out", ids.numpy(), engine), expected, noise)


def check(got, expected, noise):
    assert {pos for pos, _ in got} == set(range(34, LENGTH))
    for pos, logits in got:
        assert np.abs(logits - expected[pos].numpy()).max() <= allowed(noise), pos
