"""The quantised primitives of the decoder as torch ops, each with its eager meaning.

A lowering replaces them by its best operator; here they define what that operator must compute.
Matrices are uint8 arrays as `edge_kv.formats` describes them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from edge_kv.formats import GROUP, dequantise, find_format, unpack


def stored_values(packed: Tensor, rows: int, cols: int, format: str) -> Tensor:
    """The matrix [rows, cols] behind packed groups [groups, bytes of a group], in f32."""
    fmt = find_format(format)
    return torch.from_numpy(dequantise(fmt, unpack(fmt, packed.numpy(), rows, cols)))


@custom_op("edge_kv::linear_q", mutates_args=())
def linear_q(x: Tensor, packed: Tensor, rows: int, format: str, step: float = 0.0) -> Tensor:
    """x [T, in] times the matrix [rows, in] behind `packed`.

    A `step` above 0 rounds x to that many of its steps, -128 … 127; without one, an operator may
    round x to 8 bits as it sees fit.
    """
    if step:
        x = (x / step).round().clamp(-128, 127) * step
    return x @ stored_values(packed, rows, x.shape[-1], format).T


@linear_q.register_fake
def _(x: Tensor, packed: Tensor, rows: int, format: str, step: float = 0.0) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@custom_op("edge_kv::embed_q", mutates_args=())
def embed_q(ids: Tensor, packed: Tensor, width: int, format: str) -> Tensor:
    """Rows `ids` [T] of the matrix [rows, width] behind `packed`."""
    groups, back = torch.unique(ids // GROUP, return_inverse=True)
    values = stored_values(packed[groups], len(groups) * GROUP, width, format)
    return values[back * GROUP + ids % GROUP]


@embed_q.register_fake
def _(ids: Tensor, packed: Tensor, width: int, format: str) -> Tensor:
    return torch.empty(ids.shape[0], width, device=ids.device)


@custom_op("edge_kv::experts", mutates_args=())
def experts(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sum over the chosen experts of weight * geglu_e(x).

    x [T, D]; index, weight [T, top_k]; gate_up [E, 2I, D] (gate first); down [E, D, I].
    """
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        share = torch.where(index == e, weight, 0).sum(-1, keepdim=True)  # [T, 1]
        gate, up = (x @ gate_up[e].T).chunk(2, -1)
        hidden = torch.nn.functional.gelu(gate, approximate="tanh") * up
        out = out + share * (hidden @ down[e].T)
    return out


@experts.register_fake
def _(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(x)


@custom_op("edge_kv::geglu_experts_q", mutates_args=())
def experts_q(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, width: int,
    format: str, down_format: str,
) -> Tensor:  # fmt: skip
    """`experts` over packed stacks [E, groups, bytes of a group] of experts of `width` values."""
    return experts(
        x,
        index,
        weight,
        torch.stack([stored_values(m, 2 * width, x.shape[-1], format) for m in gate_up]),
        torch.stack([stored_values(m, x.shape[-1], width, down_format) for m in down]),
    )


@experts_q.register_fake
def _(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, width: int,
    format: str, down_format: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)
