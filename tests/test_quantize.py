"""Quantisation: packing a reader can undo, scales better than plain max, bounded integer sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_kv.export.onnx_attention import int8_mix, int8_scores, mix_bits
from edge_kv.export.quantize import quantize
from edge_kv.export.weight_file import encode_ple, ple_layout
from edge_kv.model.ops import embed_q, linear_q, unpack_blocks
from edge_kv.model.state import quantize_rows
from edge_kv.ple import PleTable
from edge_kv.presets import get_preset


def unpack_by_hand(packed: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The documented format, value by value."""
    rows, blocks, width = packed.shape
    block = width * 8 // bits
    out = np.zeros((rows, blocks * block), np.float32)
    for r, b, j in np.ndindex(rows, blocks, block):
        if bits == 4:
            byte = int(packed[r, b, j // 2])
            value = (byte >> 4 if j % 2 else byte & 15) - 8
        else:
            value = int(packed[r, b, j]) - 128
        out[r, b * block + j] = value * scales[r, b]
    return out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_packing_is_the_documented_one(bits, block):
    rows = torch.randn(5, 2 * block, generator=torch.Generator().manual_seed(bits))
    packed, scales, lost = quantize(rows, bits, block)
    values = unpack_blocks(packed, scales, bits)
    np.testing.assert_array_equal(
        values.numpy(), unpack_by_hand(packed.numpy(), scales.numpy(), bits)
    )
    assert lost == pytest.approx(float((rows - values).square().sum()), rel=1e-3)


@pytest.mark.parametrize("draw", ["normal", "uniform", "heavy"])
def test_searched_scales_beat_plain_max(draw):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(64, 256, generator=generator)
    rows = {"normal": rows, "uniform": rows.erf(), "heavy": rows**3}[draw]
    _, _, lost = quantize(rows, 4, 32)
    blocks = rows.view(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    plain = float(((blocks / scale).round() * scale - blocks).square().sum())
    assert lost < 0.9 * plain


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([4, 8]), st.floats(1e-12, 1e12), st.booleans())
def test_any_finite_rows_survive(seed, bits, size, signed):
    """Zero blocks, huge and tiny values, one-sided blocks: finite, and close to what was there."""
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * size
    rows[0, :32] = 0.0
    rows[1] = rows[1].abs()
    packed, scales, _ = quantize(rows, bits, 32, signed_scales=signed)
    values = unpack_blocks(packed, scales, bits)
    assert torch.isfinite(values).all()
    assert not values[0, :32].any()
    assert float((rows - values).norm()) < 0.3 * float(rows.norm())


def test_ops_are_plain_products_of_the_dequantised_weights():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 128, generator=generator), torch.randn(3, 128, generator=generator)
    packed, scales, _ = quantize(weight, 4, 64)
    kept = unpack_blocks(packed, scales, 4)
    assert torch.allclose(linear_q(x, packed, scales, 4, 64), x @ kept.T)
    ids = torch.tensor([7, 0, 47])
    assert torch.equal(embed_q(ids, packed.flatten(1), scales, 4, 64), kept[ids])


@pytest.mark.parametrize("scheme", ["int4", "int8", "none"])
def test_ple_rows_read_back(tmp_path, scheme):
    entry = ple_layout(get_preset("tiny").config, scheme)
    assert entry is not None
    entry = entry.model_copy(update={"rows": 6})
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
