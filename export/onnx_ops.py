"""The primitives of the ONNX lowering: torch ops with an eager meaning and an ONNX translation.

`TRANSLATIONS` also maps the decoder's own quantised ops (`edge_kv.model.ops`). Standard operators
are used wherever ONNX Runtime has a fast kernel for them; `com.microsoft` only for MatMulNBits
and GatherBlockQuantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnxscript import FLOAT, evaluator
from onnxscript.values import Opset
from torch import Tensor
from torch.library import custom_op

from edge_kv.export.onnx_functions import embed_body, linear_body
from edge_kv.formats import find_format
from edge_kv.model import ops as model_ops

OPSET = 24

DOMAIN = "edge_kv"  # functions of ours, made of standard operators: see onnx_attention
_SEEN = "q q_norm cos sin pos"
_STORED = "k v k_norm cos sin pos"


class _Schema(NamedTuple):
    """An operator the onnx package has no schema for: names of what it takes and gives."""

    domain: str
    name: str
    inputs: str
    outputs: str
    ints: str = ""
    floats: str = ""

    def register(self) -> None:
        schema, types = onnx.defs.OpSchema, [f"tensor({t})" for t in _TYPES]

        def values(names: str, letter: str) -> list[Any]:
            return [schema.FormalParameter(n, f"{letter}{i}") for i, n in enumerate(names.split())]

        inputs, outputs = values(self.inputs, "I"), values(self.outputs, "O")
        attributes = [(n, schema.AttrType.INT) for n in self.ints.split()]
        attributes += [(n, schema.AttrType.FLOAT) for n in self.floats.split()]
        onnx.defs.register_schema(
            schema(
                self.name,
                self.domain,
                1,
                inputs=inputs,
                outputs=outputs,
                type_constraints=[(v.type_str, types, "") for v in (*inputs, *outputs)],
                attributes=[schema.Attribute(n, t, "", required=False) for n, t in attributes],
            )
        )


_TYPES = ("float", "float16", "uint8", "int8", "int32", "int64")
SCHEMAS = (
    _Schema(DOMAIN, "attend_ring", f"{_SEEN} keys values", "Y", "window", "eps scale"),
    _Schema(DOMAIN, "attend_append", f"{_SEEN} keys values", "Y", "", "eps scale"),
    _Schema(DOMAIN, "attend_append_int8", f"{_SEEN} keys values k_scale v_scale", "Y", "",
            "eps scale"),
    _Schema(DOMAIN, "store_ring", f"{_STORED} keys values", "K V", "v_norm", "eps"),
    _Schema(DOMAIN, "store_append", f"{_STORED} keys values", "K V", "v_norm", "eps"),
    _Schema(DOMAIN, "store_append_int8", f"{_STORED} keys values k_scale v_scale", "K V KS VS",
            "v_norm", "eps"),
)  # fmt: skip
for _schema in SCHEMAS:
    if not onnx.defs.has(_schema.name, _schema.domain):
        _schema.register()

onnx_op: Any = Opset("", OPSET)
our_op: Any = Opset(DOMAIN, 1)
base_op: Any = Opset("", 18)  # whole functions must be of the opset torch builds at and converts


@custom_op("edge_kv::attend_rows", mutates_args=())
def attend_rows(
    q: Tensor, q_norm: Tensor, cos: Tensor, sin: Tensor, pos: Tensor, k: Tensor, v: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None, window: int, eps: float, scale: float,
) -> Tensor:  # fmt: skip
    """Attend with raw q [T, q_heads*D] at pos … pos+T-1 over stored rows; [T, q_heads*D].

    k and v are state views: a ring [1, kv_heads, slots, D] where `window` is not 0, else the live
    rows of one KV head [1, live, D], int8 (keys as uint8 + 128) where they have scales [1, live].
    """
    raise NotImplementedError("This op is lowered: see onnx_attention for its meaning.")


@attend_rows.register_fake
def _(q: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(q)


@custom_op("edge_kv::store_rows", mutates_args=())
def store_rows(
    k: Tensor, v: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, pos: Tensor,
    keys: Tensor, values: Tensor, ring: bool, v_norm: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The views `keys` and `values` with raw k, v [T, heads*D] stored at pos … pos+T-1."""
    raise NotImplementedError("This op is lowered: see onnx_attention for its meaning.")


@store_rows.register_fake
def _(
    k: Tensor, v: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, pos: Tensor,
    keys: Tensor, values: Tensor, ring: bool, v_norm: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(keys), torch.empty_like(values)


@custom_op("edge_kv::store_rows_int8", mutates_args=())
def store_rows_int8(
    k: Tensor, v: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, pos: Tensor,
    keys: Tensor, values: Tensor, k_scale: Tensor, v_scale: Tensor, v_norm: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`store_rows` into the int8 views of one KV head: keys, values and their scales [1, live]."""
    raise NotImplementedError("This op is lowered: see onnx_attention for its meaning.")


@store_rows_int8.register_fake
def _(
    k: Tensor, v: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, pos: Tensor,
    keys: Tensor, values: Tensor, k_scale: Tensor, v_scale: Tensor, v_norm: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    views = (keys, values, k_scale, v_scale)
    return tuple(torch.empty_like(x) for x in views)  # type: ignore[return-value]


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


@onnxscript.script(our_op, default_opset=base_op)
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


def _order_loops(graph: ir.Graph) -> None:
    """Put what a loop carries in order of name, so that every process writes the same file.

    onnxscript takes it from a set of strings, whose order changes with Python's hash seed.
    """
    for loop in (node for node in graph if node.op_type == "Loop"):
        inner = loop.attributes["body"].as_graph()
        carried = [value for value in loop.inputs[2:] if value is not None]
        order = sorted(range(len(carried)), key=lambda i: str(carried[i].name))
        parameters, results = list(inner.inputs[2:]), list(inner.outputs[1:])
        uses = [list(out.uses()) for out in loop.outputs]
        for at, i in enumerate(order):
            loop.replace_input_with(2 + at, carried[i])
            for node, index in uses[i]:
                node.replace_input_with(index, loop.outputs[at])
            parameters[i].name = f"{carried[i].name}_before"
            loop.outputs[at].name = f"{carried[i].name}_after"
        inner.inputs[2:] = [parameters[i] for i in order]
        inner.outputs[1:] = [results[i] for i in order]


_order_loops(attend_blocks.function_ir.graph)


def _attend_chunk(q: Any, k: Any, k_scale: Any, k_zero: int, v: Any, v_scale: Any, pos: Any) -> Any:
    tokens = onnx_op.Squeeze(onnx_op.Shape(q, start=1, end=2))
    first = onnx_op.Squeeze(pos)
    at = onnx_op.Range(first, onnx_op.Add(first, tokens), onnx_op.Constant(value_int=1))
    zero = onnx_op.Constant(value_float=float(k_zero))
    return attend_blocks(q, k, k_scale, zero, v, v_scale, at)


BODIES: dict[tuple[str, str], ir.Function] = {}  # of (operator, overload): a shape and a format


def _stored_op(name: str, overload: str, inputs: Any, body: ir.Function, **attributes: Any) -> Any:
    """A call of `linear_q` or `embed_q`, which comes with a body for its shape and format."""
    BODIES.setdefault((name, overload), body)
    node = ir.node(name, inputs, attributes, domain=DOMAIN, overload=overload)
    evaluator.default().nodes.append(node)  # type: ignore[attr-defined]
    return node.outputs[0]


def _linear(x: Any, packed: Any, rows: int, format: str, step: float = 0.0) -> Any:
    return _product(x, packed, rows, x.shape[-1], format)


def _product(x: Any, packed: Any, rows: int, cols: int, format: str) -> Any:
    body = linear_body(rows, cols, find_format(format))
    overload = f"{rows}x{cols}.{format}"
    return _stored_op("linear_q", overload, (x, packed), body, rows=rows, format=format, step=0.0)


def _embed_q(ids: Any, packed: Any, width: int, format: str) -> Any:
    body = embed_body(width, find_format(format))
    name = f"{width}.{format}"
    return _stored_op("embed_q", name, (ids, packed), body, width=width, format=format)


def _attend_rows(
    q: Any, q_norm: Any, cos: Any, sin: Any, pos: Any, k: Any, v: Any, k_scale: Any, v_scale: Any,
    window: int, eps: float, scale: float,
) -> Any:  # fmt: skip
    seen = (q, q_norm, cos, sin, pos, k, v)
    if window:
        return our_op.attend_ring(*seen, window=window, eps=eps, scale=scale)
    if k_scale is None:
        return our_op.attend_append(*seen, eps=eps, scale=scale)
    return our_op.attend_append_int8(*seen, k_scale, v_scale, eps=eps, scale=scale)


def _store_rows(
    k: Any, v: Any, k_norm: Any, cos: Any, sin: Any, pos: Any, keys: Any, values: Any, ring: bool,
    v_norm: bool, eps: float,
) -> Any:  # fmt: skip
    store = our_op.store_ring if ring else our_op.store_append
    return store(k, v, k_norm, cos, sin, pos, keys, values, v_norm=int(v_norm), eps=eps)


def _store_rows_int8(
    k: Any, v: Any, k_norm: Any, cos: Any, sin: Any, pos: Any, keys: Any, values: Any,
    k_scale: Any, v_scale: Any, v_norm: bool, eps: float,
) -> Any:  # fmt: skip
    return our_op.store_append_int8(
        k, v, k_norm, cos, sin, pos, keys, values, k_scale, v_scale, v_norm=int(v_norm), eps=eps
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
    x: Any, index: Any, weight: Any, gate_up: Any, down: Any, width: int, format: str,
    down_format: str,
) -> Any:  # fmt: skip
    def product(tokens: Any, stack: Any, which: Any, rows: int, cols: int, format: str) -> Any:
        return _product(tokens, onnx_op.Gather(stack, which, axis=0), rows, cols, format)

    dim = int(x.shape[-1])
    return _mix_experts(
        x, index, weight,
        lambda rows, e: product(rows, gate_up, e, 2 * width, dim, format),
        lambda rows, e: product(rows, down, e, dim, width, down_format),
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
    _OPS.attend_rows.default: _attend_rows,
    _OPS.store_rows.default: _store_rows,
    _OPS.store_rows_int8.default: _store_rows_int8,
    _OPS.write_rows.default: _write_rows,
    _OPS.rope.default: _rope,
    _OPS.matmul_int8.default: _matmul_int8,
    _OPS.attend_chunk.default: _attend_chunk,
    model_ops.linear_q._opoverload: _linear,
    model_ops.embed_q._opoverload: _embed_q,
    model_ops.experts._opoverload: _experts,
    model_ops.experts_q._opoverload: _experts_q,
    torch.ops.aten.arange.default: _arange,
}
