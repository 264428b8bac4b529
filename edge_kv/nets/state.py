"""put, take, select, attend: all that a decoder asks of its state, and their eager meaning.

A net norms, rotates and pools its rows itself; the state stores them, and reads them back through
one mask. `StaticState` holds the plan's tables as tensors; a lowering brings a state of its own
whose verbs are operators, and must agree with the functions here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from edge_kv.plan import SCALE, Plan, Table

TORCH_DTYPES = {"f32": torch.float32, "f16": torch.float16, "int8": torch.int8}
MASKED = -1e30  # finite, so that a row of masked scores stays finite


class Read(NamedTuple):
    """One operand of an attention: the tables of its keys and values (equal: values are keys)."""

    keys: str
    values: str
    picked: Tensor | None = None  # rows each query may see, [T, k], -1 for none; None: all


class State(Protocol):
    """What a net asks of its state; T tokens start at absolute position `pos` [1]."""

    def put(self, table: str, rows: Tensor, start: Tensor) -> None:
        """Write rows [n, heads, dim] at indices start [1] …"""

    def take(self, table: str, at: Tensor) -> Tensor:
        """The rows of an exact table at indices `at` [...]: [..., heads, dim]; zeros below 0."""

    def select(self, table: str, q: Tensor, weight: Tensor, pos: Tensor, k: int) -> Tensor:
        """Up to k rows for each query, as `select_rows` chooses them: indices [T, k], -1 none."""

    def attend(
        self, q: Tensor, reads: Sequence[Read], pos: Tensor, scale: float,
        sink: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of q [T, q_heads, dim] over all reads at once: see `attend_rows`."""


@dataclass(frozen=True)
class Stored:
    """A read with its tables' values: keys and values [slots, kv_heads, dim] as f32."""

    keys: Tensor
    values: Tensor
    stride: int
    keep: int
    picked: Tensor | None = None


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., dim] to int8 and one f32 scale [..., 1] each, max|row| / 127."""
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(1e-20) * (1 / 127)
    return torch.round(rows / scale).to(torch.int8), scale


def held_rows(last: Tensor, slots: int, keep: int) -> Tensor:
    """Row index in each slot [slots] when `last` [1] is the newest; negative: never written."""
    slot = torch.arange(slots, device=last.device)
    return last - torch.remainder(last - slot, slots) if keep else slot


def visible(at: Tensor, rows: Tensor, stride: int, keep: int) -> Tensor:
    """Which rows [S] the queries at positions `at` [T] may see: [T, S]."""
    last = rows * stride + (stride - 1)
    seen = (last <= at[:, None]) & (rows >= 0)
    return seen & (at[:, None] - rows < keep) if keep else seen


def attend_rows(
    q: Tensor, pos: Tensor, reads: Sequence[Stored], scale: float, sink: Tensor | None = None
) -> Tensor:
    """One softmax over the rows of all reads: q [T, q_heads, dim] -> [T, q_heads, dim].

    `sink` [q_heads] is one more logit of each head, which takes its share of the softmax and adds
    nothing to the sum.
    """
    n, heads, dim = q.shape
    at = pos + torch.arange(n, device=q.device)
    scores, values = [], []
    for read in reads:
        slots, kv_heads = read.keys.shape[:2]
        rows = held_rows(at[-1:], slots, read.keep)
        seen = visible(at, rows, read.stride, read.keep)
        if read.picked is not None:
            seen = seen & _chosen(read.picked, slots)
        used = seen.any(0)[:, None, None]  # rows that nobody sees may hold anything, NaN included
        grouped = q.reshape(n, kv_heads, -1, dim)
        keys = torch.where(used, read.keys, 0.0)
        score = torch.einsum("tkgd,skd->tkgs", grouped, keys) * scale
        scores.append(torch.where(seen[:, None, None], score, MASKED).reshape(n, heads, slots))
        values.append(torch.where(used, read.values, 0.0))
    if sink is not None:
        scores.append(sink[:, None].expand(n, heads, 1))
    shares = torch.cat(scores, -1).softmax(-1)
    out = torch.zeros_like(q)
    for value, share in zip(values, shares.split([s.shape[-1] for s in scores], -1), strict=False):
        grouped = share.reshape(n, value.shape[1], -1, value.shape[0])
        out = out + torch.einsum("tkgs,skd->tkgd", grouped, value).reshape(n, heads, dim)
    return out


def select_rows(
    q: Tensor, weight: Tensor, pos: Tensor, rows: Tensor, k: int, stride: int
) -> Tensor:
    """The k rows with the highest sum_h weight_h * relu(q_h . row) among those a query sees.

    q [T, heads, dim], weight [T, heads], rows [slots, 1, dim] -> indices [T, k], -1 for none.
    """
    slots = rows.shape[0]
    at = pos + torch.arange(q.shape[0], device=q.device)
    seen = visible(at, torch.arange(slots, device=q.device), stride, 0)
    used = torch.where(seen.any(0)[:, None], rows[:, 0], 0.0)
    score = (torch.einsum("thd,sd->ths", q, used).relu() * weight[..., None]).sum(1)
    top = torch.where(seen, score, MASKED).topk(min(k, slots), -1)
    return torch.where(top.values > MASKED / 2, top.indices, -1)


def _chosen(picked: Tensor, slots: int) -> Tensor:
    """[T, slots]: which slots are among picked [T, k]; -1 chooses none."""
    chosen = torch.zeros(picked.shape[0], slots + 1, dtype=torch.bool, device=picked.device)
    return chosen.scatter(1, torch.where(picked < 0, slots, picked), True)[:, :slots]


class StaticState:
    """The plan's tables as tensors [slots, heads, dim], written in place.

    `fill` is what they hold before the first write; no result depends on it.
    """

    def __init__(self, plan: Plan, fill: float = 0.0):
        self.plan = plan
        self.tables = {t.name: _filled(t, fill) for t in plan.tables}

    def put(self, table: str, rows: Tensor, start: Tensor) -> None:
        t, values = self.plan[table], self.tables[table]
        slot = torch.remainder(start + torch.arange(rows.shape[0]), t.slots)
        if t.dtype == "int8":
            rows, self.tables[table + SCALE][slot] = quantize_rows(rows)
        values[slot] = rows.to(values.dtype)

    def take(self, table: str, at: Tensor) -> Tensor:
        rows = self.tables[table][torch.remainder(at, self.plan[table].slots)]
        return torch.where((at >= 0)[..., None, None], rows, 0.0)

    def select(self, table: str, q: Tensor, weight: Tensor, pos: Tensor, k: int) -> Tensor:
        rows = self._rows(table, int(pos) + q.shape[0])
        return select_rows(q, weight, pos, rows, k, self.plan[table].stride)

    def attend(
        self, q: Tensor, reads: Sequence[Read], pos: Tensor, scale: float,
        sink: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        end = int(pos) + q.shape[0]
        stored = []
        for read in reads:
            t = self.plan[read.keys]
            keys = self._rows(read.keys, end)
            values = keys if read.values == read.keys else self._rows(read.values, end)
            stored.append(Stored(keys, values, t.stride, t.keep, read.picked))
        return attend_rows(q, pos, stored, scale, sink)

    def _rows(self, table: str, end: int) -> Tensor:
        """The rows that steps up to position end-1 may read, as floats of full width."""
        live = self.plan[table].live(end)
        values = self.tables[table]
        if self.plan[table].dtype == "int8":
            return values[:live].to(torch.float32) * self.tables[table + SCALE][:live]
        return values[:live].to(torch.float32)


def _filled(table: Table, fill: float) -> Tensor:
    dtype = TORCH_DTYPES[table.dtype]
    return torch.full(table.shape, fill if dtype.is_floating_point else 0, dtype=dtype)
