"""The decoder and its programs against transformers: every family, every parameter random.

The oracle is transformers' uncached float32 forward; the runs are in `parity_runs`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity_runs import CHUNK, LENGTH, Eager, program_logits, reference, static_logits
from weights_models import NAMES

from edge_kv.model.oracle import oracle_logits
from edge_kv.model.state import StaticState

TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    """(checkpoint directory, ids, transformers' logits [LENGTH, vocab]) of one tiny family."""
    root = tmp_path_factory.mktemp(request.param)
    return root, *reference(request.param, root)


def test_oracle_matches_transformers(case):
    root, ids, expected = case
    eager = Eager(root)
    rows = eager.ple if eager.config.ple_dim else None
    logits = oracle_logits(eager.config, eager.plan, eager.read, ids, ple_rows=rows)
    assert (logits - expected).abs().max() <= TOLERANCE
    assert expected.std() > 0.1  # a model that says nothing would agree with anything


def test_static_buffers_match_transformers(case):
    root, ids, expected = case
    got = static_logits(Eager(root), ids)
    assert sorted(got) == list(range(LENGTH))
    assert (torch.stack([got[i] for i in range(LENGTH)]) - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_prefill_then_decode_equals_the_full_run(case):
    """Prompt tokens that skip the sharing layers leave exactly the state of a full run."""
    root, ids, expected = case
    eager = Eager(root)
    full, skipped = StaticState(eager.plan), StaticState(eager.plan)
    for pos in range(0, 40, CHUNK):
        part, at = ids[pos : pos + CHUNK], torch.tensor([pos])
        rows = eager.ple(part)
        eager.decoder(part, at, rows, full)
        own = rows[:, : eager.config.n_own] if rows is not None else None
        eager.decoder.prefill(part, at, own, skipped)
    for name, buffer in full.buffers.items():
        assert torch.equal(buffer, skipped.buffers[name]), name
    part = ids[40:41]
    logits = eager.decoder.decode(part, torch.tensor([40]), eager.ple(part), skipped)
    assert (logits - expected[40]).abs().max() <= TOLERANCE


def test_onnx_matches_transformers(case, tmp_path):
    root, ids, expected = case
    check(program_logits(root, tmp_path / "artifact", ids.numpy()), expected)


# An ExecuTorch export takes a minute: two families here, all of them in benchmarks/parity.py.
@pytest.mark.parametrize("name", ["e2b", "31b"])
@pytest.mark.parametrize(
    ("engine", "attention"), [("executorch", "native"), ("executorch-python", "portable")]
)
def test_executorch_matches_transformers(name, engine, attention, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_kv.export.executorch_portable.BLOCK", 32)  # three to a buffer
    ids, expected = reference(name, tmp_path / "hf")
    out = tmp_path / "artifact"
    check(program_logits(tmp_path / "hf", out, ids.numpy(), engine, attention), expected)


def check(got, expected):
    assert len(got) > LENGTH - 34
    for pos, logits in got:
        assert np.abs(logits - expected[pos].numpy()).max() <= TOLERANCE, pos
