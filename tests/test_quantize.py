"""The operators of stored matrices, rows of the per-layer table, bounded integer sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_kv import models
from edge_kv.export.onnx_attention import int8_mix, int8_scores, mix_bits
from edge_kv.export.rounding import round_rows
from edge_kv.export.weight_file import encode_ple, ple_layout
from edge_kv.formats import FORMATS, dequantise, pack
from edge_kv.model.ops import embed_q, linear_q
from edge_kv.model.state import quantize_rows
from edge_kv.ple import PleTable


def test_ops_are_plain_products_of_the_dequantised_weights():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(37, 128, generator=generator), torch.randn(3, 128, generator=generator)
    for name in ("code4-s8", "int8-f16", "int2-row"):
        q, _ = round_rows(weight, FORMATS[name])
        packed = torch.from_numpy(pack(FORMATS[name], q))
        kept = torch.from_numpy(dequantise(FORMATS[name], q))
        assert torch.allclose(linear_q(x, packed, 37, name), x @ kept.T)
        steps = (x / 0.05).round().clamp(-128, 127) * 0.05
        assert torch.allclose(linear_q(x, packed, 37, name, 0.05), steps @ kept.T, atol=1e-5)
        ids = torch.tensor([7, 0, 36])
        assert torch.equal(embed_q(ids, packed, 128, name), kept[ids])


@pytest.mark.parametrize("scheme", ["int4", "int8", "none"])
def test_ple_rows_read_back(tmp_path, scheme):
    entry = ple_layout(models.get_row("tiny").config.token_rows, 6, scheme)
    assert entry is not None
    values = torch.randn(6, entry.values, generator=torch.Generator().manual_seed(1))
    data, lost = encode_ple(values, entry)
    path = tmp_path / "ple.bin"
    path.write_bytes(data.tobytes())
    table = PleTable(path, entry)
    ids = np.array([5, 0, 5, 3])
    rows = table.rows(ids, 3)
    table.close()
    expected = values.view(6, entry.n_layers, entry.dim)[ids, :3].numpy()
    bound = {"int4": 0.12, "int8": 0.01, "none": 0.0}[scheme]
    assert rows.shape == (4, 3, entry.dim)
    assert np.linalg.norm(rows - expected) <= bound * np.linalg.norm(expected)
    assert (lost == 0) == (scheme == "none")


def attend(q, keys, values, ctx):
    """The integer path of one decoded token over int8 rows: q [heads, D], rows [S, D] f32."""
    k, k_scale = quantize_rows(keys)
    v, v_scale = quantize_rows(values)
    stored = (k.to(torch.int32) + 128).to(torch.uint8)
    weights = (int8_scores(q, stored) * k_scale).softmax(-1)
    mixed = int8_mix(weights * v_scale, v, ctx)
    exact = (q.double() @ (k.double() * k_scale.double()[:, None]).T).softmax(-1)
    return mixed, exact @ (v.double() * v_scale.double()[:, None])


@pytest.mark.parametrize("rows", [1, 300, 5000])
def test_integer_attention_is_float_attention_over_the_stored_rows(rows):
    generator = torch.Generator().manual_seed(rows)
    q = torch.randn(8, 64, generator=generator) * 0.5
    keys = torch.randn(rows, 64, generator=generator)
    mixed, exact = attend(q, keys, torch.randn(rows, 64, generator=generator), rows)
    assert float((mixed - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize("rows", [66_312, 66_313, 131_072])
@pytest.mark.parametrize("case", ["equal", "one key dominates", "random"])
def test_int32_sums_hold_at_depth_in_the_worst_case(rows, case):
    """All weights at their largest against values of +127: the sum that would overflow first."""
    generator = torch.Generator().manual_seed(5)
    q, keys = torch.ones(1, 16), torch.zeros(rows, 16)
    values = torch.full((rows, 16), 3.0)
    if case == "one key dominates":
        keys[rows // 2] = 4.0
    elif case == "random":
        keys = torch.randn(rows, 16, generator=generator) * 0.1
        values = torch.randn(rows, 16, generator=generator).abs()
    mixed, exact = attend(q, keys, values, rows)
    assert float((mixed - exact).abs().max() / exact.abs().max()) < 2e-3


@given(st.integers(1, 262_144))
def test_mix_bits_is_the_widest_that_cannot_overflow(ctx):
    bits = mix_bits(ctx)
    assert (2**bits - 1) * 127 * ctx < 2**31
    assert bits == 8 or (2 ** (bits + 1) - 1) * 127 * ctx >= 2**31
    assert bits >= 6
