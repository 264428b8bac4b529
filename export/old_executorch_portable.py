"""The decoder's state in a `.pte` of stock operators: what an unmodified ExecuTorch can run.

Rows are written by `index_put`, which `lower_executorch` turns into its in-place form. A ring is
attended over whole. A buffer of full attention is walked in blocks, whose softmaxes are merged as
they come, so that neither the cost nor a temporary follows the context it was exported for: a loop
(`scan`) over all blocks in which a branch (`cond`) leaves out those that hold nothing yet.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from edge_kv.export.old_executorch_state import StateBuffers
from edge_kv.formats import GROUP, unpack
from edge_kv.kv_plan import RING, LayerPlan
from edge_kv.model.decoder import QuantEmbedding
from edge_kv.model.state import (
    MASKED,
    HeadNorms,
    Rope,
    prepare_kv,
    prepare_q,
    quantize_rows,
    visible,
)

BLOCK = 512  # rows of a buffer that are made float and scored at a time

Rows = tuple[Tensor, Tensor | None]  # a buffer [kv_heads, slots, dim] and its scales


class PortableState:
    """`State` over `StateBuffers` in stock operators; `tokens` is the most that a step takes."""

    def __init__(self, buffers: StateBuffers, tokens: int = 1):
        self.buffers, self.tokens = buffers, tokens

    def attend_own(
        self, layer: LayerPlan, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms, rope: Rope,
        pos: Tensor,
    ) -> Tensor:  # fmt: skip
        self.store(layer, k, v, norms, rope, pos)
        return self.attend_shared(layer, q, norms, rope, pos)

    def attend_shared(
        self, layer: LayerPlan, q: Tensor, norms: HeadNorms, rope: Rope, pos: Tensor
    ) -> Tensor:
        steps, queries = q.shape[0], prepare_q(layer, q, norms, rope)
        keys, values = self.buffers.rows(layer.k), self.buffers.rows(layer.v)
        slots = keys[0].shape[1]
        if layer.kind == RING or slots <= BLOCK:
            ring = layer.kind == RING
            held = _ring_positions(pos + (steps - 1), slots) if ring else torch.arange(slots)
            return _attend(layer, queries, keys, values, pos + torch.arange(steps), held)
        # what a loop carries must have one size: queries of a whole step, the last of them unused
        padded = F.pad(queries, (0, 0, 0, 0, 0, self.tokens - steps))
        at, end = pos + torch.arange(self.tokens), pos + steps
        return _attend_in_blocks(layer, padded, keys, values, at, end)[:steps]

    def store(
        self, layer: LayerPlan, k: Tensor, v: Tensor, norms: HeadNorms, rope: Rope, pos: Tensor
    ) -> Tensor:
        at = pos + torch.arange(k.shape[0])
        for name, rows in zip(
            (layer.k, layer.v), prepare_kv(layer, k, v, norms, rope), strict=True
        ):
            buffer, scales = self.buffers.rows(name)
            slot, rows = at % buffer.shape[1], rows.transpose(0, 1)
            if scales is not None:
                rows, scale = quantize_rows(rows)
                _put(scales, slot, scale)
            _put(buffer, slot, rows.to(buffer.dtype))
        return pos + k.shape[0]


class PortableEmbedding(nn.Module):
    """`QuantEmbedding` in stock operators: the packed rows are looked up, then unpacked."""

    def __init__(self, source: QuantEmbedding):
        super().__init__()
        fmt, rows = source.format, len(source.packed) * GROUP
        self.bits = fmt.bits
        q = unpack(fmt, source.packed.numpy(), rows, source.dim)
        stored: np.ndarray[Any, Any] = (q.codes - np.int8(fmt.low)).view(np.uint8)
        if self.bits == 4:
            stored = stored[:, 0::2] | stored[:, 1::2] << 4
        scales = q.block_scales if q.row_scales is None else q.row_scales[:, None]
        assert scales is not None
        self.packed = nn.Parameter(torch.from_numpy(stored), requires_grad=False)
        self.scales = nn.Parameter(torch.from_numpy(scales.astype(np.float32)), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows, scales = self.packed.index_select(0, ids), self.scales.index_select(0, ids)
        values = rows.to(torch.float32)
        if self.bits == 4:
            high = torch.floor(values * (1 / 16))
            values = torch.stack((values - high * 16, high), -1).flatten(-2)
        values = values.unflatten(-1, (scales.shape[-1], -1)) - 2 ** (self.bits - 1)
        return (values * scales.unsqueeze(-1)).flatten(-2)


def for_any_runtime(module: nn.Module) -> None:
    """Replace what needs operators of ours outside the state."""
    for name, child in list(module.named_children()):
        if isinstance(child, QuantEmbedding):
            setattr(module, name, PortableEmbedding(child))
        else:
            for_any_runtime(child)


def _put(buffer: Tensor, slot: Tensor, rows: Tensor) -> None:
    """buffer [heads, slots, …] takes rows [heads, T, …] at slot [T]."""
    torch.ops.aten.index_put_(buffer, [None, slot], rows)


def _ring_positions(last: Tensor, slots: int) -> Tensor:
    """`model.state.ring_positions` without negative operands: the runtime's remainder is C's."""
    return last - torch.remainder(last + slots - torch.arange(slots), slots)


def _fold(layer: LayerPlan, queries: Tensor) -> Tensor:
    """Queries [T, q_heads, dim] as columns [kv_heads, dim, T * group]: heads are just rows."""
    group = layer.q_heads // layer.kv_heads
    return queries.unflatten(1, (layer.kv_heads, group)).permute(1, 3, 0, 2).flatten(2).contiguous()


def _unfold(layer: LayerPlan, out: Tensor) -> Tensor:
    """[kv_heads, T * group, dim] to [T, q_heads * dim]."""
    group = layer.q_heads // layer.kv_heads
    return out.unflatten(1, (-1, group)).permute(1, 0, 2, 3).flatten(1)


def _scores(keys: Tensor, scales: Tensor | None, folded: Tensor) -> Tensor:
    """Keys [kv_heads, S, dim] times folded queries: [kv_heads, T * group, S].

    The cache is the left operand, which is the one that no kernel wants transposed.
    """
    scores = torch.bmm(keys.to(torch.float32), folded).transpose(1, 2)
    return scores if scales is None else scores * scales.unsqueeze(1)


def _mix(weights: Tensor, values: Tensor, scales: Tensor | None) -> Tensor:
    """Weights [kv_heads, T * group, S] times values [kv_heads, S, dim]."""
    weights = weights if scales is None else weights * scales.unsqueeze(1)
    return torch.bmm(weights, values.to(torch.float32))


def _columns(layer: LayerPlan, at: Tensor) -> Tensor:
    """Positions [T] of the folded queries, [T * group]."""
    group = layer.q_heads // layer.kv_heads
    return (at.unsqueeze(1) + torch.zeros(group, dtype=torch.int64)).flatten()


def _attend(
    layer: LayerPlan, queries: Tensor, keys: Rows, values: Rows, at: Tensor, held: Tensor
) -> Tensor:
    """Attention over whole buffers whose slots hold the positions `held`."""
    scores = _scores(*keys, _fold(layer, queries))
    seen = visible(_columns(layer, at), held, layer.window)
    weights = torch.where(seen, scores, MASKED).softmax(-1)
    return _unfold(layer, _mix(weights, *values))


def _attend_in_blocks(
    layer: LayerPlan, queries: Tensor, keys: Rows, values: Rows, at: Tensor, end: Tensor
) -> Tensor:
    """Attention over the slots below `end` [1]; slot and position are the same."""
    slots = keys[0].shape[1]
    folded, columns = _fold(layer, queries), _columns(layer, at).unsqueeze(1)
    heads, dim, count = folded.shape

    def take(rows: Rows, slot: Tensor) -> Rows:
        buffer, scales = rows
        taken = None if scales is None else scales.index_select(1, slot)
        return buffer.index_select(1, slot), taken

    def attend(top: Tensor, total: Tensor, mix: Tensor, block: Tensor) -> tuple[Tensor, ...]:
        held = block * BLOCK + torch.arange(BLOCK)
        slot = held.clamp_max(slots - 1)  # of the last block, rows beyond the end are masked
        scores = torch.where(held <= columns, _scores(*take(keys, slot), folded), MASKED)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, shrink = torch.exp(scores - higher), torch.exp(top - higher)
        total = total * shrink + weights.sum(-1, keepdim=True)
        return higher, total, mix * shrink + _mix(weights, *take(values, slot))

    def skip(top: Tensor, total: Tensor, mix: Tensor, block: Tensor) -> tuple[Tensor, ...]:
        return top.clone(), total.clone(), mix.clone()

    def step(carry: tuple[Tensor, ...], block: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        live = block * BLOCK < end
        return torch.cond(live, attend, skip, (*carry, block)), block.clone()

    begin = (
        torch.full((heads, count, 1), MASKED),
        torch.zeros(heads, count, 1),
        torch.zeros(heads, count, dim),
    )
    (_, total, mix), _ = scan(step, begin, torch.arange(-(-slots // BLOCK)))
    return _unfold(layer, mix / total)
