"""The primitives of the ONNX lowering: torch ops with an eager meaning and an ONNX translation.

`TRANSLATIONS` also maps the decoder's own quantised ops (`edge_kv.model.ops`). Standard operators
are used wherever ONNX Runtime has a fast kernel for them; `com.microsoft` only for MatMulNBits,
GatherBlockQuantized and GroupQueryAttention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
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
    "GroupQueryAttention": (
        "query key value past_key past_value seqlens_k total_sequence_length",
        "num_heads kv_num_heads scale",
    ),
}


def _declare(name: str, inputs: str, attributes: str) -> None:
    schema, any_type = onnx.defs.OpSchema, ["tensor(float)", "tensor(uint8)", "tensor(int8)"]
    any_type += ["tensor(int32)", "tensor(int64)"]
    kinds = {"scale": schema.AttrType.FLOAT}
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
                schema.Attribute(a, kinds.get(a, schema.AttrType.INT), "", required=False)
                for a in attributes.split()
            ],
        )
    )


for _name, (_inputs, _attributes) in _CONTRIB_OPS.items():
    if not onnx.defs.has(_name, CONTRIB):
        _declare(_name, _inputs, _attributes)

onnx_op: Any = Opset("", OPSET)
ms_op: Any = Opset(CONTRIB, 1)


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
def rope(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate halves of each head: x [T, heads*head_dim], cos and sin [T, head_dim/2]."""
    a, b = x.unflatten(-1, (heads, -1)).chunk(2, -1)
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((a * c - b * s, b * c + a * s), -1).flatten(-2)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return torch.empty_like(x)


def _rope(x: Any, cos: Any, sin: Any, heads: int) -> Any:
    batch = onnx_op.Constant(value_ints=[0])
    out = onnx_op.RotaryEmbedding(
        onnx_op.Unsqueeze(x, batch),
        onnx_op.Unsqueeze(cos, batch),
        onnx_op.Unsqueeze(sin, batch),
        num_heads=heads,
    )
    return onnx_op.Squeeze(out, batch)


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
def attend_chunk(q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    """Causal attention of T new queries over rows 0 … pos+T-1 of one KV head, no mask tensor.

    q [T, heads, D] (scaled), k and v [1, live, D]; the rows of this chunk are already written.
    """
    t = q.shape[0]
    at = pos + torch.arange(t)
    scores = torch.einsum("thd,sd->hts", q, k[0])
    seen = torch.arange(k.shape[1]).unsqueeze(0) <= at.unsqueeze(1)
    return torch.einsum("hts,sd->thd", scores.masked_fill(~seen, -1e30).softmax(-1), v[0])


@attend_chunk.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    return torch.empty_like(q)


def _attend_chunk(q: Any, k: Any, v: Any, pos: Any) -> Any:
    heads, dim = q.shape[1], q.shape[2]
    batch, head = onnx_op.Constant(value_ints=[0]), onnx_op.Constant(value_ints=[1])
    flat = onnx_op.Reshape(q, onnx_op.Constant(value_ints=[1, -1, heads * dim]))
    end = onnx_op.Add(pos, onnx_op.Shape(q, start=0, end=1))  # [1]
    total = onnx_op.Cast(onnx_op.Squeeze(end, batch), to=6)  # 6: int32
    last = onnx_op.Cast(onnx_op.Sub(end, head), to=6)
    none = onnx_op.ConstantOfShape(onnx_op.Constant(value_ints=[1, 0, dim]))
    out = ms_op.GroupQueryAttention(
        flat, none, none, onnx_op.Unsqueeze(k, head), onnx_op.Unsqueeze(v, head), last, total,
        num_heads=heads, kv_num_heads=1, scale=1.0,
    )  # fmt: skip
    return onnx_op.Reshape(out, onnx_op.Constant(value_ints=[-1, heads, dim]))


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
