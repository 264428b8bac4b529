"""Nets in stock operators: the state and the weights of a portable `.pte`.

Rows are written by `index_put`, which `lower_executorch` turns into its in-place form. A window is
attended over whole. A table that keeps everything is walked in blocks, whose softmaxes are merged
as they come, so that neither the cost nor a temporary follows the context it was exported for: a
loop (`scan`) over all blocks in which a branch (`cond`) leaves out those that hold nothing yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.utils._python_dispatch import TorchDispatchMode

from edge_kv import models
from edge_kv.export.executorch_tables import Tables
from edge_kv.export.packed_weights import PackedEmbedding
from edge_kv.formats import GROUP, unpack
from edge_kv.models.model import Model
from edge_kv.nets import make_net
from edge_kv.nets.ops import NAMESPACE, OPERATORS
from edge_kv.nets.state import MASKED, Read, held_rows, quantize_rows, visible
from edge_kv.nets.weights import Weights

BLOCK = 512  # rows of a table that are made float and scored at a time
# Operators of a net that the stock runtime has no form of, in the words of a user.
MISSING = {
    "experts_q": "a mixture of experts",
    "select": "a choice of blocks",
    "sinkhorn": "mixed residual streams",
    "attend": "attention with sinks or to two tables at once",
}
# Those whose meaning is traced in stock operators in their place.
TRACED = {OPERATORS[name].overload: OPERATORS[name].eager for name in ("norm_rope", "softcap")}

Stored = tuple[Tensor, Tensor | None]  # a table [slots, kv_heads, dim] and its scales


class PortableState:
    """`nets.state.State` over `Tables` in stock operators; a step takes at most `tokens`."""

    def __init__(self, tables: Tables, tokens: int):
        self.tables, self.take, self.tokens = tables, tables.take, tokens

    def put(self, table: str, rows: Tensor, start: Tensor) -> None:
        values, scales = self.tables.stored(table)
        slot = torch.remainder(start + torch.arange(rows.shape[0]), values.shape[0])
        if scales is not None:
            rows, steps = quantize_rows(rows)
            torch.ops.aten.index_put_(scales, [slot], steps)
        torch.ops.aten.index_put_(values, [slot], rows.to(values.dtype))

    def select(self, table: str, q: Tensor, weight: Tensor, pos: Tensor, k: int) -> Tensor:
        raise NotImplementedError(MISSING["select"])

    def attend(
        self, q: Tensor, reads: Sequence[Read], pos: Tensor, scale: float,
        sink: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        (read,) = reads
        if sink is not None or read.picked is not None:
            raise NotImplementedError(MISSING["attend"])
        t, steps = self.tables.plan[read.keys], q.shape[0]
        keys, values = self.tables.stored(read.keys), self.tables.stored(read.values)
        q = q * scale
        if t.keep or t.slots <= BLOCK:
            last = pos + (steps - 1)
            # held_rows without negative operands: the runtime's remainder is C's
            held = (
                last - torch.remainder(last + t.slots - torch.arange(t.slots), t.slots)
                if t.keep
                else held_rows(last, t.slots, 0)
            )
            return _attend(q, keys, values, pos + torch.arange(steps), held, t.keep)
        # what a loop carries must have one size: queries of a whole step, the last of them unused
        padded = F.pad(q, (0, 0, 0, 0, 0, self.tokens - steps))
        at, end = pos + torch.arange(self.tokens), pos + steps
        return _attend_in_blocks(padded, keys, values, at, end)[:steps]


def _heads_first(rows: Tensor) -> Tensor:
    """[rows, heads, n] as f32 [heads, rows, n]."""
    if rows.shape[1] == 1:  # no copy
        return rows.to(torch.float32).reshape(1, rows.shape[0], rows.shape[2])
    return rows.to(torch.float32).transpose(0, 1)


def _fold(q: Tensor, kv_heads: int) -> Tensor:
    """Queries [T, heads, dim] as columns [kv_heads, dim, T * group]: heads are just rows."""
    return q.unflatten(1, (kv_heads, -1)).permute(1, 3, 0, 2).flatten(2).contiguous()


def _unfold(out: Tensor, group: int) -> Tensor:
    """[kv_heads, T * group, dim] to [T, heads, dim]."""
    return out.unflatten(1, (-1, group)).permute(1, 0, 2, 3).flatten(1, 2)


def _scores(stored: Stored, folded: Tensor) -> Tensor:
    """Keys times folded queries: [kv_heads, T * group, rows].

    The keys are the left operand, which is the one that no kernel wants transposed.
    """
    keys, scales = stored
    scores = torch.bmm(_heads_first(keys), folded).transpose(1, 2)
    return scores if scales is None else scores * _heads_first(scales).transpose(1, 2)


def _mix(weights: Tensor, stored: Stored) -> Tensor:
    """Weights [kv_heads, T * group, rows] times the values of those rows."""
    values, scales = stored
    weights = weights if scales is None else weights * _heads_first(scales).transpose(1, 2)
    return torch.bmm(weights, _heads_first(values))


def _columns(at: Tensor, group: int) -> Tensor:
    """Positions [T] of the folded queries, [T * group]."""
    return (at.unsqueeze(1) + torch.zeros(group, dtype=torch.int64)).flatten()


def _attend(q: Tensor, keys: Stored, values: Stored, at: Tensor, held: Tensor, keep: int) -> Tensor:
    """Attention over whole tables whose slots hold the rows `held`."""
    kv_heads = keys[0].shape[1]
    group = q.shape[1] // kv_heads
    scores = _scores(keys, _fold(q, kv_heads))
    seen = visible(_columns(at, group), held, 1, keep)
    weights = torch.where(seen, scores, MASKED).softmax(-1)
    return _unfold(_mix(weights, values), group)


def _attend_in_blocks(q: Tensor, keys: Stored, values: Stored, at: Tensor, end: Tensor) -> Tensor:
    """Attention over the slots below `end` [1]; slot and position are the same."""
    slots, kv_heads = keys[0].shape[:2]
    group = q.shape[1] // kv_heads
    folded, columns = _fold(q, kv_heads), _columns(at, group).unsqueeze(1)
    _, dim, count = folded.shape

    def take(stored: Stored, slot: Tensor) -> Stored:
        table, scales = stored
        taken = None if scales is None else scales.index_select(0, slot)
        return table.index_select(0, slot), taken

    def attend(top: Tensor, total: Tensor, mix: Tensor, block: Tensor) -> tuple[Tensor, ...]:
        held = block * BLOCK + torch.arange(BLOCK)
        slot = held.clamp_max(slots - 1)  # of the last block, rows beyond the end are masked
        scores = torch.where(held <= columns, _scores(take(keys, slot), folded), MASKED)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, shrink = torch.exp(scores - higher), torch.exp(top - higher)
        total = total * shrink + weights.sum(-1, keepdim=True)
        return higher, total, mix * shrink + _mix(weights, take(values, slot))

    def skip(top: Tensor, total: Tensor, mix: Tensor, block: Tensor) -> tuple[Tensor, ...]:
        return top.clone(), total.clone(), mix.clone()

    def step(carry: tuple[Tensor, ...], block: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        live = block * BLOCK < end
        return torch.cond(live, attend, skip, (*carry, block)), block.clone()

    begin = (
        torch.full((kv_heads, count, 1), MASKED),
        torch.zeros(kv_heads, count, 1),
        torch.zeros(kv_heads, count, dim),
    )
    (_, total, mix), _ = scan(step, begin, torch.arange(-(-slots // BLOCK)))
    return _unfold(mix / total, group)


class PortableEmbedding(nn.Module):
    """`PackedEmbedding` in stock operators: the packed rows are looked up, then unpacked."""

    def __init__(self, source: PackedEmbedding):
        super().__init__()
        fmt, rows = source.format, len(source.packed) * GROUP
        self.bits = fmt.bits
        q = unpack(fmt, source.packed.numpy(), rows, source.width)
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


def replace_embeddings(module: nn.Module) -> None:
    """Put token tables in stock operators."""
    for name, child in list(module.named_children()):
        if isinstance(child, PackedEmbedding):
            setattr(module, name, PortableEmbedding(child))
        else:
            replace_embeddings(child)


class _Record(TorchDispatchMode):
    """Notes the operators of ours that a net calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.called.add(func._opname)
        return func(*args, **(kwargs or {}))


class _Asked:
    """A state without tables, which notes what a net asks of it that portable programs lack."""

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self.rows: dict[str, Tensor] = {}  # that were put last

    def put(self, table: str, rows: Tensor, start: Tensor) -> None:
        self.rows[table] = rows

    def take(self, table: str, at: Tensor) -> Tensor:
        rows = self.rows[table]
        return rows.new_empty((*at.shape, *rows.shape[1:]))

    def select(self, table: str, q: Tensor, weight: Tensor, pos: Tensor, k: int) -> Tensor:
        self.missing.add("select")
        return pos.new_empty(q.shape[0], k)

    def attend(
        self, q: Tensor, reads: Sequence[Read], pos: Tensor, scale: float,
        sink: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if sink is not None or len(reads) > 1 or reads[0].picked is not None:
            self.missing.add("attend")
        return q.new_empty(q.shape)


def missing_operators(config: Model) -> list[str]:
    """What a net computes that the stock runtime has no operators for, in a user's words."""
    with torch.device("meta"):
        net: Any = make_net(config, Weights(models.weights(config)))
        net.to("meta")
        ids, pos = torch.empty(2, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
        fed = config.token_rows
        rows = None if fed is None else torch.empty(2, fed.layers, fed.dim)
        state = _Asked()
        with torch.no_grad(), _Record() as record:
            net.logits(net(ids, pos, state, rows))
    return [MISSING[name] for name in MISSING if name in record.called | state.missing]
