"""The quantised primitives of the decoder as torch ops, each with its eager meaning.

A lowering replaces them by its best operator; here they define what that operator must compute.
Weights are symmetric: `bits` 4 packs two values a byte, low nibble first, stored + 8; `bits` 8
stores + 128. One f32 scale serves `block` consecutive values of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op


def unpack_blocks(packed: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Dequantise packed [..., n_blocks, block*bits/8] uint8 to f32 [..., n_blocks*block]."""
    if bits == 4:
        values = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).to(torch.float32) - 8
    else:
        values = packed.to(torch.float32) - 128
    return (values * scales.unsqueeze(-1)).flatten(-2)


@custom_op("edge_kv::linear_q", mutates_args=())
def linear_q(x: Tensor, packed: Tensor, scales: Tensor, bits: int, block: int) -> Tensor:
    """x [T, in] times the dequantised [out, in]: packed [out, in/block, block*bits/8]."""
    return x @ unpack_blocks(packed, scales, bits).T


@linear_q.register_fake
def _(x: Tensor, packed: Tensor, scales: Tensor, bits: int, block: int) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


@custom_op("edge_kv::embed_q", mutates_args=())
def embed_q(ids: Tensor, packed: Tensor, scales: Tensor, bits: int, block: int) -> Tensor:
    """Rows `ids` [T] of a table packed as [rows, width*bits/8] with scales [rows, width/block]."""
    rows = packed[ids].unflatten(-1, (scales.shape[-1], -1))
    return unpack_blocks(rows, scales[ids], bits)


@embed_q.register_fake
def _(ids: Tensor, packed: Tensor, scales: Tensor, bits: int, block: int) -> Tensor:
    return scales.new_empty(ids.shape[0], packed.shape[1] * 8 // bits)


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
    x: Tensor, index: Tensor, weight: Tensor,
    gate_up: Tensor, gate_up_scales: Tensor, down: Tensor, down_scales: Tensor, bits: int,
) -> Tensor:  # fmt: skip
    """`experts` over packed [E, out, in/block, block*bits/8] stacks."""
    return experts(
        x,
        index,
        weight,
        unpack_blocks(gate_up, gate_up_scales, bits),
        unpack_blocks(down, down_scales, bits),
    )


@experts_q.register_fake
def _(
    x: Tensor, index: Tensor, weight: Tensor,
    gate_up: Tensor, gate_up_scales: Tensor, down: Tensor, down_scales: Tensor, bits: int,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)
