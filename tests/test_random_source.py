"""Random weights that are drawn as they are stored."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import tiny

from edge_kv import models, runtime
from edge_kv.artifact import read_artifact
from edge_kv.export import export_model
from edge_kv.formats import FORMATS, GROUP, dequantise, unpack
from edge_kv.models.checkpoint import config_from_hf
from edge_kv.models.model import EXPERT, EXPERT8, LINEAR, Row
from edge_kv.models.random_source import RandomSource


def source(family, name, seed=0):
    config = config_from_hf(tiny(family).config.to_dict())
    return RandomSource(config, seed, dict.fromkeys((LINEAR, EXPERT, EXPERT8, "embed"), name))


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_whole_matrices_of_a_format(name, monkeypatch):
    fmt, drawn = FORMATS[name], source("zaya", name)
    for weight in ("embed", "layers.0.attn.late", "layers.0.experts.gate_up"):
        shape = drawn.rows[weight].shape
        packed = drawn.packed(weight, fmt, 0, shape[0])
        for matrix in packed if len(shape) == 3 else [packed]:
            whole = dequantise(fmt, unpack(fmt, matrix, len(matrix) * GROUP, shape[-1]))
            assert not whole[shape[-2] :].any() and whole[: shape[-2]].any(1).all()
        values = drawn.read(weight)
        assert values.std() == pytest.approx(shape[-1] ** -0.5, rel=0.25)
        if weight == "embed":
            monkeypatch.setattr("edge_kv.models.random_source._DRAWN", 1)
            assert np.array_equal(drawn.read(weight, 5, 45), drawn.read(weight)[5:45])
            part = drawn.packed(weight, fmt, GROUP, shape[0])
            assert np.array_equal(drawn.packed(weight, fmt, 0, shape[0])[1:], part)
            monkeypatch.undo()
        elif len(shape) == 3:
            assert np.array_equal(drawn.read(weight, 1, 3), values[1:3])
            assert not np.array_equal(values[0], values[1])
    assert not np.array_equal(drawn.read("embed"), source("zaya", name, 1).read("embed"))


def test_a_named_model_is_exported_from_drawn_bytes(tmp_path, monkeypatch):
    config = config_from_hf(tiny("zaya").config.to_dict())
    monkeypatch.setitem(models.ROWS, "small", Row(config, "", ""))

    def rounds(*args):
        raise AssertionError("random matrices are not rounded")

    monkeypatch.setattr("edge_kv.export.weight_file.round_rows", rounds)
    root = export_model(
        model="small", weights="random:3", ctx=64, chunk=8, out=tmp_path / "made",
        open_session=runtime.load,
    )  # fmt: skip
    made = read_artifact(root)
    assert made.manifest.made["source"] == "random weights, seed 3"
    assert all(report.error == 0 for report in made.manifest.quant.tensors.values())
    assert (
        made.parity("onnx")["quantisation"]["max_kl"] < 0.05
    )  # of the 8-bit state and activations
    session = runtime.load(root)
    assert np.isfinite(session.decode(5)).all()
    session.close()
