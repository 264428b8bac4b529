"""Operators of a net: their meaning against the oracle, and as functions of an ONNX program."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from edge_kv.export.lower_onnx import to_onnx
from edge_kv.export.onnx_functions import attach_functions
from edge_kv.export.rounding import round_rows
from edge_kv.formats import FORMATS, dequantise, pack
from edge_kv.nets import ops
from edge_kv.nets.state import Stored, attend_rows, quantize_rows, select_rows


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def whole(*values: int) -> torch.Tensor:
    return torch.tensor(values)


class Call(torch.nn.Module):
    """One call of an operator: tensors are inputs, None and plain values are fixed."""

    def __init__(self, op, arguments):
        super().__init__()
        self.op, self.arguments = op, arguments

    def forward(self, *tensors):
        given = iter(tensors)
        out = self.op(*(next(given) if isinstance(a, torch.Tensor) else a for a in self.arguments))
        return tuple(out) if isinstance(out, list) else out


def as_onnx(op, *arguments, open_axes=""):
    """What a stock onnxruntime computes for one call.

    `open_axes` has one character a tensor: "." where its shape is fixed, else the name of axis 0.
    """
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    names = open_axes or "." * len(tensors)
    axes = tuple(None if name == "." else {0: name} for name in names)
    module = Call(op, [torch.empty(0) if isinstance(a, torch.Tensor) else a for a in arguments])
    trace = tuple(t.to("meta") for t in tensors)
    model = to_onnx(module, trace, (axes,), {})
    attach_functions(model, lambda m, a, s: to_onnx(m, a, s, {}))
    model.ir_version = 11
    model.opset_imports.setdefault("com.microsoft", 1)
    engine = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    feed = {i.name: t.numpy() for i, t in zip(engine.get_inputs(), tensors, strict=True)}
    return engine.run(None, feed)


def close(op, *arguments, open_axes="", atol=2e-6):
    expected = op(*arguments)
    expected = expected if isinstance(expected, list) else [expected]
    for mine, theirs in zip(expected, as_onnx(op, *arguments, open_axes=open_axes), strict=True):
        np.testing.assert_allclose(theirs, mine.numpy(), rtol=1e-5, atol=atol)


NOTHING = (None,) * 5


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attend_is_the_oracle_over_two_reads_with_picked_rows_and_a_sink(tokens, kv_heads):
    q, sink, pos = draw(tokens, 4, 8), draw(4), whole(37)
    ring, blocks = draw(20, kv_heads, 8), draw(12, kv_heads, 8, seed=3)
    picked = torch.stack([torch.tensor([i % 9, -1, 3]) for i in range(tokens)])
    expected = attend_rows(
        q, pos, [Stored(ring, ring, 1, 9), Stored(blocks, blocks, 4, 0, picked)], 0.3, sink
    )
    arguments = (
        q, pos, sink, ring, None, ring, None, None, blocks, None, blocks, None, picked,
        0.3, [1, 4], [9, 0],
    )  # fmt: skip
    torch.testing.assert_close(ops.attend(*arguments), expected, rtol=1e-5, atol=1e-6)
    close(ops.attend, *arguments, open_axes=".....bb." if tokens == 1 else "t....bbt")


@pytest.mark.parametrize("tokens", [1, 5])
def test_attend_over_int8_rows_is_the_oracle_over_what_they_stand_for(tokens):
    q, pos = draw(tokens, 6, 8), whole(30)
    (k, ks), (v, vs) = quantize_rows(draw(64, 2, 8)), quantize_rows(draw(64, 2, 8, seed=9))
    expected = attend_rows(q, pos, [Stored(k * ks, v * vs, 1, 0)], 0.4)
    arguments = (q, pos, None, k, ks, v, vs, None, *NOTHING, 0.4, [1], [0])
    torch.testing.assert_close(ops.attend(*arguments), expected, rtol=1e-5, atol=1e-6)
    close(ops.attend, *arguments, open_axes="..ssss" if tokens == 1 else "t.ssss")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("start", [0, 6, 17])
def test_put_writes_rows_modulo_the_length_and_nothing_else(dtype, start):
    table, rows = draw(8, 2, 4).to(dtype), draw(5, 2, 4, seed=1)
    (out,) = ops.put(table, None, rows, whole(start))
    expected = table.clone()
    for i, row in enumerate(rows):
        expected[(start + i) % 8] = row.to(dtype)
    assert torch.equal(out, expected)
    assert not torch.equal(out, table)
    close(ops.put, table, None, rows, whole(start), open_axes="sn.")


def test_put_rounds_rows_to_int8_with_a_scale_for_each_head():
    table, scales = torch.zeros(8, 2, 4, dtype=torch.int8), torch.zeros(8, 2, 1)
    rows = draw(3, 2, 4)
    values, steps = ops.put(table, scales, rows, whole(6))
    back = (values * steps)[[6, 7, 0]]
    assert (back - rows).abs().max() <= rows.abs().amax(-1).max() / 254 + 1e-7
    assert values[1:6].abs().sum() == 0 and steps[1:6].abs().sum() == 0
    close(ops.put, table, scales, rows, whole(6), open_axes="ssn.")


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("k", [3, 40])
def test_select_picks_the_rows_that_the_oracle_picks(tokens, k):
    q, weight, pos, rows = draw(tokens, 5, 8), draw(tokens, 5), whole(61), draw(24, 1, 8)
    expected = select_rows(q, weight, pos, rows, k, 4)
    arguments = (q, weight, pos, rows, None, k, 4)
    (engine,) = as_onnx(ops.select, *arguments, open_axes="...b" if tokens == 1 else "tt.b")
    for found in (ops.select(*arguments), torch.from_numpy(engine)):
        assert found.shape == (tokens, k)
        for mine, theirs in zip(found.tolist(), expected.tolist(), strict=True):
            assert {i for i in mine if i >= 0} == {i for i in theirs if i >= 0}


@pytest.mark.parametrize("style", [ops.HALVES, ops.PAIRS_LAST])
@pytest.mark.parametrize("pairs", [2, 4])
def test_norm_rope_turns_pairs_of_normed_heads(style, pairs):
    x, weight, angle = draw(3, 2, 8), draw(8), draw(3, pairs)
    out = ops.norm_rope(x, weight, angle.cos(), angle.sin(), 1e-6, style)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    at = (
        [(j, j + pairs) for j in range(pairs)]
        if style == ops.HALVES
        else [(8 - 2 * pairs + 2 * j, 8 - 2 * pairs + 2 * j + 1) for j in range(pairs)]
    )
    expected = normed.clone()
    for j, (a, b) in enumerate(at):
        turn = torch.complex(normed[..., a], normed[..., b]) * torch.exp(1j * angle[:, None, j])
        expected[..., a], expected[..., b] = turn.real, turn.imag
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    close(ops.norm_rope, x, weight, angle.cos(), angle.sin(), 1e-6, style, open_axes="t.tt")
    assert torch.equal(ops.norm_rope(x, None, None, None, -1.0, style), x)


def test_sinkhorn_makes_rows_and_columns_sum_to_one():
    x = draw(3, 4, 4)
    out = ops.sinkhorn(x, 20, 1e-6)
    torch.testing.assert_close(out.sum(1), torch.ones(3, 4), rtol=0, atol=1e-4)
    torch.testing.assert_close(out.sum(2), torch.ones(3, 4), rtol=0, atol=1e-4)
    close(ops.sinkhorn, x, 20, 1e-6, open_axes="t")


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("act", "limit"), [(ops.SILU, 0.5), (ops.GELU, 0.0)])
def test_experts_run_where_they_are_chosen(tokens, packed, act, limit):
    """5 experts; index 5 names none, and one expert is chosen by nobody."""
    x, weight = draw(tokens, 64), draw(tokens, 2).softmax(-1)
    index = torch.stack([torch.tensor([i % 4, 5 if i % 2 else 3]) for i in range(tokens)])
    gate_up, down = draw(5, 64, 64) / 8, draw(5, 64, 32) / 6
    stacks, names = [gate_up, down], ("code4-s8", "int8-f16") if packed else ("", "")
    if packed:
        for i, (stack, name) in enumerate(zip((gate_up, down), names, strict=True)):
            fmt = FORMATS[name]
            rounded = [round_rows(matrix, fmt)[0] for matrix in stack]
            stacks[i] = torch.stack([torch.from_numpy(pack(fmt, q)) for q in rounded])
            kept = torch.stack([torch.from_numpy(dequantise(fmt, q)) for q in rounded])
            gate_up, down = (kept, down) if i == 0 else (gate_up, kept)
    expected = torch.zeros_like(x)
    for t in range(tokens):
        for e, w in zip(index[t].tolist(), weight[t], strict=True):
            if e < 5:
                gate, up = (gate_up[e] @ x[t]).chunk(2)
                expected[t] += w * (down[e] @ ops.gated(gate, up, act, limit))
    arguments = (x, index, weight, *stacks, 32, *names, act, limit)
    torch.testing.assert_close(ops.experts_q(*arguments), expected, rtol=1e-5, atol=1e-5)
    close(
        ops.experts_q,
        *arguments,
        open_axes=("" if tokens == 1 else "ttt.."),
        atol=1e-5,
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_norm_add_is_the_residual_plus_the_norm(scaled):
    x, weight, residual = draw(3, 8), draw(8), draw(3, 8, seed=1)
    scale = torch.tensor([0.3]) if scaled else None
    expected = residual + x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    expected = expected * 0.3 if scaled else expected
    arguments = (x, weight, residual, scale, 1e-6)
    torch.testing.assert_close(ops.norm_add(*arguments), expected, rtol=1e-5, atol=1e-6)
    close(ops.norm_add, *arguments, open_axes="t.t." if scaled else "t.t")


def test_softcap_bounds_smoothly():
    x = draw(3, 50) * 40
    torch.testing.assert_close(ops.softcap(x, 30.0), torch.tanh(x / 30) * 30)
    close(ops.softcap, x, 30.0, open_axes="t")


def stored(name, rows, cols, seed=0):
    """A random matrix as it is stored, and in floats."""
    rounded = round_rows(draw(rows, cols, seed=seed) / 8, FORMATS[name])[0]
    exact = torch.from_numpy(dequantise(FORMATS[name], rounded))
    return torch.from_numpy(pack(FORMATS[name], rounded)), exact


@pytest.mark.parametrize("name", ["code4-s8", "int8-f16", "int4-row"])
@pytest.mark.parametrize("ends", [(0.0, 0.0, 1.5), (0.0, 0.0, 0.0), (0.03, 0.05, 1.5)])
def test_a_head_is_the_product_whatever_blocks_it_is_taken_in(monkeypatch, name, ends):
    """Rows that fill no last block, with and without steps and a soft cap."""
    monkeypatch.setattr(ops, "ROW_BLOCK", 32)
    x, (step, out_step, cap) = draw(3, 64), ends
    packed, exact = stored(name, 75, 64)
    expected = (ops.to_steps(x, step) if step else x) @ exact.T
    expected = ops.to_steps(expected, out_step) if out_step else expected
    expected = ops.softcap(expected, cap) if cap else expected
    arguments = (x, packed, 75, name, *ends)
    torch.testing.assert_close(ops.linear_q(*arguments), expected, rtol=1e-5, atol=1e-5)
    # onnxruntime rounds x to 8 bits, or adds in another order: a half may fall on the other side
    (found,) = as_onnx(ops.linear_q, *arguments, open_axes="t.")
    assert np.abs(found - expected.numpy()).max() <= max(1.01 * out_step, 0.03)


@pytest.mark.parametrize("given", [False, True])
def test_glu_q_rounds_to_the_steps_it_is_given(given):
    x, names = draw(4, 64), ("int2-row", "int4-row", "int8-row")
    (gate, g), (up, u), (down, d) = (
        stored(n, *s, seed=i) for i, (n, s) in
        enumerate(zip(names, ((32, 64), (32, 64), (64, 32)), strict=True))
    )  # fmt: skip
    factor, steps = draw(4, 32, seed=5) if given else None, (0.03, 0.04, 0.05, 0.02, 0.01)
    into = ops.to_steps(x, 0.03)
    other = factor if given else ops.to_steps(into @ u.T, 0.05)
    hidden = ops.to_steps(ops.gated(ops.to_steps(into @ g.T, 0.04), other, ops.SILU, 0.0), 0.02)
    expected = ops.to_steps(hidden @ d.T, 0.01)
    arguments = (x, gate, None if given else up, factor, down, 32, names[0],
                 "" if given else names[1], names[2], ops.SILU, 0.0, *steps)  # fmt: skip
    torch.testing.assert_close(ops.glu_q(*arguments), expected, rtol=1e-5, atol=0.0101)
    (found,) = as_onnx(ops.glu_q, *arguments)
    difference = np.abs(found - expected.numpy())
    assert difference.max() <= 0.03 and difference.mean() <= 0.002


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("act", "limit"), [(ops.SILU, 0.5), (ops.GELU, 0.0)])
def test_glu_q_multiplies_what_the_gate_opens(tokens, given, act, limit):
    """With a second matrix of another format, or with given factors."""
    x, names = draw(tokens, 64), ("code4-s8", "int4-f16", "int8-f16")
    exact, packed = [], []
    for name, shape in zip(names, ((32, 64), (32, 64), (64, 32)), strict=True):
        rounded = round_rows(draw(*shape, seed=len(exact)) / 8, FORMATS[name])[0]
        exact.append(torch.from_numpy(dequantise(FORMATS[name], rounded)))
        packed.append(torch.from_numpy(pack(FORMATS[name], rounded)))
    factor = draw(tokens, 32, seed=5) if given else None
    up = x @ exact[1].T if factor is None else factor
    expected = ops.gated(x @ exact[0].T, up, act, limit) @ exact[2].T
    arguments = (x, packed[0], None if given else packed[1], factor, packed[2], 32, names[0],
                 "" if given else names[1], names[2], act, limit)  # fmt: skip
    torch.testing.assert_close(ops.glu_q(*arguments), expected, rtol=1e-5, atol=1e-5)
    axes = "t.t." if given else "t..."
    close(ops.glu_q, *arguments, open_axes="" if tokens == 1 else axes, atol=1e-5)


def test_every_operator_names_its_tensors_in_order():
    assert set(ops.OPERATORS) == {
        "put", "attend", "select", "norm_rope", "sinkhorn", "linear_q", "embed_q", "experts_q",
        "norm_add", "softcap", "glu_q",
    }  # fmt: skip
    assert ops.OPERATORS["put"].tensors == ("table", "scales", "rows", "start")
    assert ops.OPERATORS["attend"].tensors[:3] == ("q", "pos", "sink")
