"""The seam between the decoder and its state: who keeps keys and values, and how they are read.

The decoder hands raw projections to a state; norm, rope, the row write and attention happen there.
`UncachedState` is the slow oracle, `StaticState` the eager meaning of the static buffers; each
lowering brings its own state and must agree with these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_kv.kv_plan import RING, KVPlan, LayerPlan

TORCH_DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}
MASKED = -1e30  # finite, so that a fully masked row stays finite


@dataclass(frozen=True)
class HeadNorms:
    """Per-head RMS norms of one layer: weights [head_dim] of q and k; v is normed without one."""

    q: Tensor
    k: Tensor | None
    v: bool
    eps: float


@dataclass(frozen=True)
class Rope:
    """cos and sin [T, head_dim/2] of one layer type at the absolute positions of this step."""

    cos: Tensor
    sin: Tensor


class State(Protocol):
    """What a decoder layer asks of its state; T tokens start at absolute position `pos` [1]."""

    def attend_own(
        self, layer: LayerPlan, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms, rope: Rope,
        pos: Tensor,
    ) -> Tensor:  # fmt: skip
        """Write k, v [T, kv_heads*head_dim] at pos, attend with q [T, q_heads*head_dim]."""

    def attend_shared(
        self, layer: LayerPlan, q: Tensor, norms: HeadNorms, rope: Rope, pos: Tensor
    ) -> Tensor:
        """Attend with q over the rows another layer wrote in this same step or before."""


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding over halves (neox layout): x [T, heads, head_dim]."""
    a, b = x.chunk(2, -1)
    cos, sin = rope.cos.unsqueeze(1), rope.sin.unsqueeze(1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def prepare_q(layer: LayerPlan, q: Tensor, norms: HeadNorms, rope: Rope) -> Tensor:
    """Raw queries to normed, rotated, scaled [T, q_heads, head_dim]."""
    heads = q.unflatten(-1, (layer.q_heads, layer.head_dim))
    out = rotate(F.rms_norm(heads, (layer.head_dim,), norms.q, norms.eps), rope)
    return out if layer.scale == 1.0 else out * layer.scale


def prepare_kv(
    layer: LayerPlan, k: Tensor, v: Tensor, norms: HeadNorms, rope: Rope
) -> tuple[Tensor, Tensor]:
    """Raw keys and values to the rows that are stored, each [T, kv_heads, head_dim].

    V is taken before the key norm and is never rotated, also where it is the raw key projection.
    """
    shape = (layer.kv_heads, layer.head_dim)
    keys = rotate(F.rms_norm(k.unflatten(-1, shape), shape[1:], norms.k, norms.eps), rope)
    values = v.unflatten(-1, shape)
    return keys, F.rms_norm(values, shape[1:], None, norms.eps) if norms.v else values


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., dim] to int8 and one f32 scale each, max|row| / 127."""
    scale = rows.abs().amax(-1).clamp_min(1e-20) * (1 / 127)
    return torch.round(rows / scale.unsqueeze(-1)).to(torch.int8), scale


def visible(q_pos: Tensor, k_pos: Tensor, window: int) -> Tensor:
    """Which keys a query may see, [T, S]: written (not negative), not later, within the window."""
    distance = q_pos.unsqueeze(1) - k_pos.unsqueeze(0)
    seen = (distance >= 0) & (k_pos >= 0).unsqueeze(0)
    return seen & (distance < window) if window else seen


def ring_positions(last: Tensor, slots: int) -> Tensor:
    """Absolute position in each slot when `last` [1] is the newest; negative: never written."""
    return last - torch.remainder(last - torch.arange(slots, device=last.device), slots)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [T, q_heads, D], k and v [S, kv_heads, D], additive mask [T, S] -> [T, q_heads*D]."""
    t, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(t, kv_heads, q_heads // kv_heads, dim)
    scores = torch.einsum("tkgd,skd->kgts", grouped, k) + mask
    out = torch.einsum("kgts,skd->tkgd", scores.softmax(-1), v)
    return out.reshape(t, q_heads * dim)


class UncachedState:
    """The oracle: keeps nothing between steps; the whole sequence must be passed at once.

    `store` maps prepared rows to what reading them back from the buffer yields, so that the oracle
    of a quantised cache is as exact as the oracle of a float one.
    """

    def __init__(self, store: Callable[[LayerPlan, Tensor], Tensor] | None = None):
        self.store = store or (lambda layer, rows: rows)
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}

    def attend_own(
        self, layer: LayerPlan, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms, rope: Rope,
        pos: Tensor,
    ) -> Tensor:  # fmt: skip
        keys, values = prepare_kv(layer, k, v, norms, rope)
        self.rows[layer.layer] = self.store(layer, keys), self.store(layer, values)
        return self.attend_shared(layer, q, norms, rope, pos)

    def attend_shared(
        self, layer: LayerPlan, q: Tensor, norms: HeadNorms, rope: Rope, pos: Tensor
    ) -> Tensor:
        keys, values = self.rows[layer.source]
        at = pos + torch.arange(q.shape[0])
        mask = torch.where(visible(at, at, layer.window), 0.0, MASKED)
        return softmax_attention(prepare_q(layer, q, norms, rope), keys, values, mask)


class StaticState:
    """The plan's preallocated buffers as tensors [heads, slots, dim], written in place."""

    def __init__(self, plan: KVPlan):
        self.plan = plan
        self.buffers = {
            b.name: torch.zeros(b.shape, dtype=TORCH_DTYPES[b.dtype]) for b in plan.buffers
        }

    def attend_own(
        self, layer: LayerPlan, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms, rope: Rope,
        pos: Tensor,
    ) -> Tensor:  # fmt: skip
        at = pos + torch.arange(q.shape[0])
        for name, rows in zip(
            (layer.k, layer.v), prepare_kv(layer, k, v, norms, rope), strict=True
        ):
            self._write(name, rows, at)
        return self.attend_shared(layer, q, norms, rope, pos)

    def attend_shared(
        self, layer: LayerPlan, q: Tensor, norms: HeadNorms, rope: Rope, pos: Tensor
    ) -> Tensor:
        at = pos + torch.arange(q.shape[0])
        end = int(at[-1]) + 1
        buffer = self.plan.by_name[layer.k]
        ring = buffer.kind == RING
        slots = buffer.slots if ring else end
        held = ring_positions(at[-1:], slots) if ring else torch.arange(slots)
        mask = torch.where(visible(at, held, layer.window), 0.0, MASKED)
        keys, values = (self._read(name, slots) for name in (layer.k, layer.v))
        return softmax_attention(prepare_q(layer, q, norms, rope), keys, values, mask)

    def _write(self, name: str, rows: Tensor, at: Tensor) -> None:
        buffer = self.plan.by_name[name]
        slot = at % buffer.slots
        rows = rows.transpose(0, 1)  # [heads, T, dim]
        if buffer.dtype == "int8":
            rows, self.buffers[f"{name}.scale"][:, slot] = quantize_rows(rows)
        self.buffers[name][:, slot] = rows.to(self.buffers[name].dtype)

    def _read(self, name: str, slots: int) -> Tensor:
        rows = self.buffers[name][:, :slots].to(torch.float32)
        if self.plan.by_name[name].dtype == "int8":
            rows = rows * self.buffers[f"{name}.scale"][:, :slots, None]
        return rows.transpose(0, 1)  # [slots, heads, dim]


def stored_rows(plan: KVPlan) -> Callable[[LayerPlan, Tensor], Tensor]:
    """What a row looks like after its buffer's storage: the `store` of an `UncachedState`."""

    def store(layer: LayerPlan, rows: Tensor) -> Tensor:
        dtype = plan.by_name[f"k{layer.layer}"].dtype
        if dtype == "int8":
            values, scale = quantize_rows(rows)
            return values.to(torch.float32) * scale.unsqueeze(-1)
        return rows.to(TORCH_DTYPES[dtype]).to(torch.float32)

    return store
