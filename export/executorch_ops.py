"""The operators of our own engine as torch ops: attention over static state, and what lies between.

`edge_kv::attend_own`, `attend_shared` and `store_own` mutate the plan's buffers in place, which is
what keeps a step from copying them; the functions here are their eager meaning, built on
`model.state`, and `runtime/native` holds the kernels that a `.pte` calls. ExecuTorch resolves an
operator by its `.out` overload, so every op has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_kv.model import ops as model_ops
from edge_kv.model.state import (
    MASKED,
    Rope,
    quantize_rows,
    ring_positions,
    rotate,
    softmax_attention,
    visible,
)
from edge_kv.nets import ops as net_ops

_BUFFERS = (
    "Tensor{a} keys, Tensor{b}? key_scales, Tensor{c} values, Tensor{d}? value_scales, Tensor pos"
)
_READ = _BUFFERS.format(a="", b="", c="", d="")
_WRITE = _BUFFERS.format(a="(a!)", b="(b!)", c="(c!)", d="(d!)")
_SCHEMAS = {
    "attend_own": "Tensor q, Tensor k, Tensor v, Tensor q_norm, Tensor k_norm, Tensor cos, "
    f"Tensor sin, {_WRITE}, int window, bool v_norm, float eps, float scale",
    "attend_shared": f"Tensor q, Tensor q_norm, Tensor cos, Tensor sin, {_READ}, int window, "
    "float eps, float scale",
    "store_own": f"Tensor k, Tensor v, Tensor k_norm, Tensor cos, Tensor sin, {_WRITE}, "
    "bool v_norm, float eps",
}
_library = torch.library.Library("edge_kv", "FRAGMENT")


def _attend_shared(
    q: Tensor, q_norm: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, key_scales: Tensor | None,
    values: Tensor, value_scales: Tensor | None, pos: Tensor, window: int, eps: float,
    scale: float,
) -> Tensor:  # fmt: skip
    """Attend with raw q [T, q_heads*dim] over buffers [kv_heads, slots, dim]; a row is at
    pos % slots and a `window` of 0 sees everything. Returns [T, q_heads*dim]."""
    slots, dim = keys.shape[1:]
    at = pos + torch.arange(q.shape[0])
    normed = F.rms_norm(q.unflatten(-1, (-1, dim)), (dim,), q_norm, eps)
    held = ring_positions(at[-1:], slots)
    mask = torch.where(visible(at, held, window), 0.0, MASKED)
    return softmax_attention(
        rotate(normed, Rope(cos, sin)) * scale,
        _rows(keys, key_scales),
        _rows(values, value_scales),
        mask,
    )


def _store_own(
    k: Tensor, v: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, keys: Tensor,
    key_scales: Tensor | None, values: Tensor, value_scales: Tensor | None, pos: Tensor,
    v_norm: bool, eps: float,
) -> Tensor:  # fmt: skip
    """Write raw k and v [T, kv_heads*dim] at pos … pos+T-1; returns pos + T, [1]."""
    heads, slots, dim = keys.shape
    slot = (pos + torch.arange(k.shape[0])) % slots
    rotated = rotate(F.rms_norm(k.unflatten(-1, (heads, dim)), (dim,), k_norm, eps), Rope(cos, sin))
    plain = v.unflatten(-1, (heads, dim))
    if v_norm:
        plain = F.rms_norm(plain, (dim,), None, eps)
    for rows, buffer, scales in ((rotated, keys, key_scales), (plain, values, value_scales)):
        rows = rows.transpose(0, 1)
        if scales is not None:
            rows, scales[:, slot] = quantize_rows(rows)
        buffer[:, slot] = rows.to(buffer.dtype)
    return pos + k.shape[0]


def _attend_own(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor,
    keys: Tensor, key_scales: Tensor | None, values: Tensor, value_scales: Tensor | None,
    pos: Tensor, window: int, v_norm: bool, eps: float, scale: float,
) -> Tensor:  # fmt: skip
    """`store_own`, then `attend_shared` over what it wrote."""
    buffers = (keys, key_scales, values, value_scales, pos)
    _store_own(k, v, k_norm, cos, sin, *buffers, v_norm, eps)
    return _attend_shared(q, q_norm, cos, sin, *buffers, window, eps, scale)


def _put(table: Tensor, scales: Tensor | None, rows: Tensor, start: Tensor) -> Tensor:
    """`nets.ops.put` in place; returns start + n, [1]."""
    slot = torch.remainder(start + torch.arange(rows.shape[0]), table.shape[0])
    if scales is None:
        table.index_copy_(0, slot, rows.to(table.dtype))
    else:
        values = rows.abs().amax(-1, keepdim=True).clamp_min(1e-20) * (1 / 127)
        table.index_copy_(0, slot, torch.round(rows / values).to(torch.int8))
        scales.index_copy_(0, slot, values)
    return start + rows.shape[0]


def _rows(buffer: Tensor, scales: Tensor | None) -> Tensor:
    """A buffer [heads, slots, dim] as f32 [slots, heads, dim]."""
    rows = buffer.to(torch.float32)
    return (rows if scales is None else rows * scales.unsqueeze(-1)).transpose(0, 1)


def _define(
    name: str, schema: str, eager: Callable[..., Tensor], shape: Callable[..., Any]
) -> None:
    _library.define(f"{name}({schema}) -> Tensor")
    _library.impl(name, eager, "CPU")
    _library.impl(name, shape, "Meta")
    _define_out(name, schema, eager)


def _define_out(name: str, schema: str, eager: Callable[..., Tensor]) -> None:
    def out_of(*args: Any, out: Tensor) -> Tensor:
        return out.copy_(eager(*args))

    _library.define(f"{name}.out({schema}, *, Tensor(z!) out) -> Tensor(z!)")
    _library.impl(f"{name}.out", out_of, "CompositeExplicitAutograd")


_define("attend_own", _SCHEMAS["attend_own"], _attend_own, lambda q, *rest: q.new_empty(q.shape))
_define(
    "attend_shared",
    _SCHEMAS["attend_shared"],
    _attend_shared,
    lambda q, *rest: q.new_empty(q.shape),
)
_define(
    "store_own",
    _SCHEMAS["store_own"],
    _store_own,
    lambda k, *rest: k.new_empty(1, dtype=torch.int64),
)
_define(
    "linear",
    "Tensor x, Tensor weight",
    lambda x, weight: F.linear(x, weight),
    lambda x, weight: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
_define(
    "rms_norm",
    "Tensor x, Tensor? weight, float eps",
    lambda x, weight, eps: F.rms_norm(x, x.shape[-1:], weight, eps),
    lambda x, *rest: x.new_empty(x.shape),
)
_define(
    "gated",
    "Tensor gate, Tensor up, str act, float limit",
    net_ops.gated,
    lambda gate, *rest: gate.new_empty(gate.shape),
)
_define(
    "gelu_mul",
    "Tensor gate, Tensor up",
    lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    lambda gate, up: gate.new_empty(gate.shape),
)
_define(
    "softcap",
    "Tensor x, float cap",
    lambda x, cap: torch.tanh(x / cap) * cap,
    lambda x, cap: x.new_empty(x.shape),
)
_define(
    "put_in_place",
    "Tensor(a!) table, Tensor(b!)? scales, Tensor rows, Tensor start",
    _put,
    lambda table, scales, rows, start: start.new_empty(1),
)
_define_out(
    "linear_q",
    "Tensor x, Tensor packed, SymInt rows, str format, float step=0.0",
    model_ops.linear_q,
)
_define_out(
    "embed_q",
    "Tensor ids, Tensor packed, SymInt width, str format",
    model_ops.embed_q,
)

attend_own: Any = torch.ops.edge_kv.attend_own
attend_shared: Any = torch.ops.edge_kv.attend_shared
store_own: Any = torch.ops.edge_kv.store_own
linear: Any = torch.ops.edge_kv.linear
rms_norm: Any = torch.ops.edge_kv.rms_norm
gelu_mul: Any = torch.ops.edge_kv.gelu_mul
gated: Any = torch.ops.edge_kv.gated
softcap: Any = torch.ops.edge_kv.softcap
put_in_place: Any = torch.ops.edge_kv.put_in_place
