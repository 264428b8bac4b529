"""The operators of our own engine that a net does not name, as torch ops.

What lies between two products, a product with float weights, and `put` in place, which is what
keeps a step from copying a table: the functions here are their eager meaning, and `runtime/native`
holds the kernels that a `.pte` calls. ExecuTorch resolves an operator by its `.out` overload, so
every op has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_kv.nets import ops as net_ops

_library = torch.library.Library("edge_kv", "FRAGMENT")


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
    "put_in_place",
    "Tensor(a!) table, Tensor(b!)? scales, Tensor rows, Tensor start",
    _put,
    lambda table, scales, rows, start: start.new_empty(1),
)
linear: Any = torch.ops.edge_kv.linear
rms_norm: Any = torch.ops.edge_kv.rms_norm
gated: Any = torch.ops.edge_kv.gated
put_in_place: Any = torch.ops.edge_kv.put_in_place
