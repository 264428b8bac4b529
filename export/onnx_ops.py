"""The primitives of the ONNX lowering: torch ops with an eager meaning and an ONNX translation.

`TRANSLATIONS` also maps the decoder's own quantised ops (`edge_kv.model.ops`). Standard operators
are used wherever ONNX Runtime has a fast kernel for them; `com.microsoft` only for MatMulNBits
and GatherBlockQuantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnxscript
import torch
from onnxscript import FLOAT
from onnxscript.values import Opset
from torch import Tensor
from torch.library import custom_op

from edge_kv.model import ops as model_ops

OPSET = 24
CONTRIB = "com.microsoft"

# ONNX Runtime's contrib operators have no schema in the onnx package: name -> (inputs, attributes).
_CONTRIB_OPS: dict[str, tuple[str, str]] = {
    "MatMulNBits": ("A B scales", "K N bits block_size accuracy_level"),
    "GatherBlockQuantized": ("data indices scales", "bits block_size gather_axis quantize_axis"),
}


def _declare(name: str, inputs: str, attributes: str) -> None:
    schema, any_type = onnx.defs.OpSchema, ["tensor(float)", "tensor(uint8)", "tensor(int8)"]
    any_type += ["tensor(int32)", "tensor(int64)"]
    given = inputs.split()
    onnx.defs.register_schema(
        schema(
            name,
            CONTRIB,
            1,
            inputs=[schema.FormalParameter(n, f"T{i}") for i, n in enumerate(given)],
            outputs=[schema.FormalParameter("output", "TO")],
            type_constraints=[(f"T{i}", any_type, "") for i in range(len(given))]
            + [("TO", ["tensor(float)"], "")],
            attributes=[
                schema.Attribute(a, schema.AttrType.INT, "", required=False)
                for a in attributes.split()
            ],
        )
    )


for _name, (_inputs, _attributes) in _CONTRIB_OPS.items():
    if not onnx.defs.has(_name, CONTRIB):
        _declare(_name, _inputs, _attributes)

onnx_op: Any = Opset("", OPSET)
ms_op: Any = Opset(CONTRIB, 1)
base_op: Any = Opset("", 18)  # whole functions must be of the opset torch builds at and converts


@custom_op("edge_kv::write_rows", mutates_args=())
def write_rows(buffer: Tensor, rows: Tensor, pos: Tensor, axis: int, ring: bool) -> Tensor:
    """Rows placed at pos, pos+1, … along `axis` (modulo its length for a ring)."""
    out = buffer.clone()
    at = pos + torch.arange(rows.shape[axis])
    out.index_copy_(axis, at % buffer.shape[axis] if ring else at, rows)
    return out


@write_rows.register_fake
def _(buffer: Tensor, rows: Tensor, pos: Tensor, axis: int, ring: bool) -> Tensor:
    return torch.empty_like(buffer)


def _write_rows(buffer: Any, rows: Any, pos: Any, axis: int, ring: bool) -> Any:
    mode = "circular" if ring else "linear"
    return onnx_op.TensorScatter(buffer, rows, pos, mode=mode, axis=axis)


@custom_op("edge_kv::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves of each head: x [1, heads, T, D], cos and sin [T, D/2]."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rope(x: Any, cos: Any, sin: Any) -> Any:
    batch = onnx_op.Constant(value_ints=[0])
    return onnx_op.RotaryEmbedding(x, onnx_op.Unsqueeze(cos, batch), onnx_op.Unsqueeze(sin, batch))


@custom_op("edge_kv::matmul_int8", mutates_args=())
def matmul_int8(a: Tensor, b: Tensor, a_zero: int) -> Tensor:
    """(a - a_zero) @ b with a uint8 [M, K], b int8 [K, N], accumulated in int32."""
    return (
        (a.to(torch.int64) - a_zero).to(torch.float64).matmul(b.to(torch.float64)).to(torch.int32)
    )


@matmul_int8.register_fake
def _(a: Tensor, b: Tensor, a_zero: int) -> Tensor:
    return torch.empty(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)


def _matmul_int8(a: Any, b: Any, a_zero: int) -> Any:
    if a_zero == 0:
        return onnx_op.MatMulInteger(a, b)
    zero = onnx_op.Cast(onnx_op.Constant(value_int=a_zero), to=2)  # 2: uint8
    return onnx_op.MatMulInteger(a, b, zero)


@custom_op("edge_kv::attend_chunk", mutates_args=())
def attend_chunk(
    q: Tensor, k: Tensor, k_scale: Tensor, k_zero: int, v: Tensor, v_scale: Tensor, pos: Tensor
) -> Tensor:
    """Causal attention of T new queries over rows 0 … pos+T-1 of one KV head.

    q [heads, T, D] (scaled); stored k, v [1, live, D] stand for (k - k_zero) * k_scale [1, live].
    The rows of this chunk are already written. The score matrix never exists as a whole.
    """
    at = pos + torch.arange(q.shape[1])
    keys = (k[0].to(torch.float32) - k_zero) * k_scale[0].unsqueeze(-1)
    values = v[0].to(torch.float32) * v_scale[0].unsqueeze(-1)
    scores = torch.einsum("htd,sd->hts", q, keys)
    seen = torch.arange(k.shape[1]).unsqueeze(0) <= at.unsqueeze(1)
    return torch.einsum("hts,sd->htd", scores.masked_fill(~seen, -1e30).softmax(-1), values)


@attend_chunk.register_fake
def _(
    q: Tensor, k: Tensor, k_scale: Tensor, k_zero: int, v: Tensor, v_scale: Tensor, pos: Tensor
) -> Tensor:
    return torch.empty_like(q)


@onnxscript.script(Opset("edge_kv", 1), default_opset=base_op)
def attend_blocks(q, k, k_scale, k_zero, v, v_scale, at) -> FLOAT[...]:  # type: ignore
    """`attend_chunk`, one block of rows after the other.

    Rows become float a block at a time and the softmax is carried along (its running maximum,
    sum and weighted values), so the workspace does not grow with the context.
    """
    axis = base_op.Constant(value_ints=[1])
    live = base_op.Shape(k, start=1, end=2)
    block = base_op.Constant(value_ints=[1024])
    n_blocks = base_op.Squeeze(base_op.Div(live + block - axis, block))
    last = base_op.Constant(value_ints=[2])
    top = base_op.ReduceMax(q, last, keepdims=1) * 0.0 - 1e30
    total = top * 0.0
    mixed = q * 0.0
    for i in range(n_blocks):
        start = base_op.Reshape(i, axis) * block
        stop = base_op.Min(start + block, live)
        keys = base_op.Cast(base_op.Slice(k, start, stop, axis), to=1) - k_zero
        keys = keys * base_op.Unsqueeze(base_op.Slice(k_scale, start, stop, axis), last)
        values = base_op.Cast(base_op.Slice(v, start, stop, axis), to=1)
        values = values * base_op.Unsqueeze(base_op.Slice(v_scale, start, stop, axis), last)
        held = base_op.Range(
            base_op.Squeeze(start), base_op.Squeeze(stop), base_op.Constant(value_int=1)
        )
        seen = base_op.LessOrEqual(held, base_op.Unsqueeze(at, axis))
        hidden = base_op.Where(
            seen, base_op.Constant(value_float=0.0), base_op.Constant(value_float=-1e30)
        )
        scores = base_op.MatMul(q, base_op.Transpose(keys, perm=[0, 2, 1])) + hidden
        highest = base_op.Max(top, base_op.ReduceMax(scores, last, keepdims=1))
        weights = base_op.Exp(scores - highest)
        keep = base_op.Exp(top - highest)
        total = total * keep + base_op.ReduceSum(weights, last, keepdims=1)
        mixed = mixed * keep + base_op.MatMul(weights, values)
        top = highest
    return mixed / total


def _attend_chunk(q: Any, k: Any, k_scale: Any, k_zero: int, v: Any, v_scale: Any, pos: Any) -> Any:
    tokens = onnx_op.Squeeze(onnx_op.Shape(q, start=1, end=2))
    first = onnx_op.Squeeze(pos)
    at = onnx_op.Range(first, onnx_op.Add(first, tokens), onnx_op.Constant(value_int=1))
    zero = onnx_op.Constant(value_float=float(k_zero))
    return attend_blocks(q, k, k_scale, zero, v, v_scale, at)


def _linear_q(x: Any, packed: Any, scales: Any, bits: int, block: int) -> Any:
    n_out, n_blocks = scales.shape
    return ms_op.MatMulNBits(
        x, packed, scales, K=n_blocks * block, N=n_out, bits=bits, block_size=block,
        accuracy_level=4,
    )  # fmt: skip


def _embed_q(ids: Any, packed: Any, scales: Any, bits: int, block: int) -> Any:
    return ms_op.GatherBlockQuantized(
        packed, ids, scales, bits=bits, block_size=block, gather_axis=0, quantize_axis=1
    )


def _experts(x: Any, index: Any, weight: Any, gate_up: Any, down: Any) -> Any:
    def product(rows: Any, stack: Any, which: Any) -> Any:
        matrix = onnx_op.Gather(stack, which, axis=0)
        return onnx_op.MatMul(rows, onnx_op.Transpose(matrix, perm=[1, 0]))

    return _mix_experts(
        x, index, weight,
        lambda rows, e: product(rows, gate_up, e), lambda rows, e: product(rows, down, e),
        gate_up.shape[0],
    )  # fmt: skip


def _experts_q(
    x: Any, index: Any, weight: Any, gate_up: Any, gate_up_scales: Any, down: Any,
    down_scales: Any, bits: int,
) -> Any:  # fmt: skip
    def product(rows: Any, stack: Any, scales: Any, which: Any) -> Any:
        _, n_out, n_blocks, width = stack.shape
        block = width * 8 // bits
        return ms_op.MatMulNBits(
            rows, onnx_op.Gather(stack, which, axis=0), onnx_op.Gather(scales, which, axis=0),
            K=n_blocks * block, N=n_out, bits=bits, block_size=block, accuracy_level=0,
        )  # fmt: skip

    return _mix_experts(
        x, index, weight,
        lambda rows, e: product(rows, gate_up, gate_up_scales, e),
        lambda rows, e: product(rows, down, down_scales, e),
        gate_up.shape[0],
    )  # fmt: skip


Product = Callable[[Any, Any], Any]  # (rows [T, in], expert index) -> [T, out]


def _mix_experts(
    x: Any, index: Any, weight: Any, into: Product, down: Product, n_experts: int
) -> Any:
    """One token gathers only its top_k experts; a chunk runs every expert over all its tokens."""
    zero = onnx_op.Constant(value_ints=[0])
    if x.shape[0] == 1:
        chosen = [onnx_op.Constant(value_int=j) for j in range(index.shape[1])]
        flat = onnx_op.Squeeze(index, zero)
        picks = [(onnx_op.Gather(flat, j), onnx_op.Gather(weight, j, axis=1)) for j in chosen]
    else:
        picks = []
        for e in range(n_experts):
            which = onnx_op.Constant(value_int=e)
            hit = onnx_op.Cast(onnx_op.Equal(index, which), to=1)  # 1: float
            share = onnx_op.ReduceSum(
                onnx_op.Mul(hit, weight), onnx_op.Constant(value_ints=[1]), keepdims=0
            )
            picks.append((which, share))
    total = None
    for which, share in picks:
        gate, up = onnx_op.Split(into(x, which), axis=-1, num_outputs=2)
        out = down(onnx_op.Mul(onnx_op.Gelu(gate, approximate="tanh"), up), which)
        part = onnx_op.Mul(out, onnx_op.Unsqueeze(share, onnx_op.Constant(value_ints=[1])))
        total = part if total is None else onnx_op.Add(total, part)
    return total


def _arange(end: Any, **kwargs: Any) -> Any:
    """0 … end-1 as int64: torch's own translation leaves a CastLike that ORT cannot fold."""
    stop = onnx_op.Constant(value_int=end) if isinstance(end, int) else onnx_op.Cast(end, to=7)
    return onnx_op.Range(onnx_op.Constant(value_int=0), stop, onnx_op.Constant(value_int=1))


_OPS = torch.ops.edge_kv
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    _OPS.write_rows.default: _write_rows,
    _OPS.rope.default: _rope,
    _OPS.matmul_int8.default: _matmul_int8,
    _OPS.attend_chunk.default: _attend_chunk,
    model_ops.linear_q._opoverload: _linear_q,
    model_ops.embed_q._opoverload: _embed_q,
    model_ops.experts._opoverload: _experts,
    model_ops.experts_q._opoverload: _experts_q,
    torch.ops.aten.arange.default: _arange,
}
