"""The decoder's state in a `.pte`: module buffers that one native op per layer writes and reads."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from edge_kv.export import executorch_ops as op
from edge_kv.kv_plan import KVPlan, LayerPlan
from edge_kv.model.state import TORCH_DTYPES, HeadNorms, Rope, State


class StateBuffers(nn.Module):
    """The plan's buffers [heads, slots, dim] under names that a module may have."""

    def __init__(self, plan: KVPlan):
        super().__init__()
        self.chunk = plan.chunk
        for b in plan.buffers:
            buffer = torch.zeros(b.shape, dtype=TORCH_DTYPES[b.dtype])
            self.register_buffer(attribute(b.name), buffer, persistent=False)

    def rows(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Buffer `name` ("k14") and its scales, None where it is not quantised."""
        return getattr(self, attribute(name)), getattr(self, attribute(f"{name}.scale"), None)


def attribute(name: str) -> str:
    """A buffer's attribute: "k3.scale" is "k3_scale"."""
    return name.replace(".", "_")


class StoringState(State, Protocol):
    """A `State` that can also store rows without attending over them."""

    def store(
        self, layer: LayerPlan, k: Tensor, v: Tensor, norms: HeadNorms, rope: Rope, pos: Tensor
    ) -> Tensor:
        """Write k, v [T, kv_heads*head_dim] at pos; returns pos + T, [1]."""


class NativeState:
    """`State` over `StateBuffers`; every attention is one op of ours on the raw projections."""

    def __init__(self, buffers: StateBuffers):
        self.buffers = buffers

    def attend_own(
        self, layer: LayerPlan, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms, rope: Rope,
        pos: Tensor,
    ) -> Tensor:  # fmt: skip
        return op.attend_own(
            q, k, v, norms.q, norms.k, rope.cos, rope.sin,
            *self.buffers.rows(layer.k), *self.buffers.rows(layer.v), pos,
            layer.window, norms.v, norms.eps, layer.scale,
        )  # fmt: skip

    def attend_shared(
        self, layer: LayerPlan, q: Tensor, norms: HeadNorms, rope: Rope, pos: Tensor
    ) -> Tensor:
        return op.attend_shared(
            q, norms.q, rope.cos, rope.sin,
            *self.buffers.rows(layer.k), *self.buffers.rows(layer.v), pos,
            layer.window, norms.eps, layer.scale,
        )  # fmt: skip

    def store(
        self, layer: LayerPlan, k: Tensor, v: Tensor, norms: HeadNorms, rope: Rope, pos: Tensor
    ) -> Tensor:
        return op.store_own(
            k, v, norms.k, rope.cos, rope.sin,
            *self.buffers.rows(layer.k), *self.buffers.rows(layer.v), pos, norms.v, norms.eps,
        )  # fmt: skip


class PrefillState:
    """State of a prompt chunk: the last layer only stores, since nothing reads its output.

    That saves its attention, which no dead-code pass could remove from an op that also writes.
    """

    def __init__(self, state: StoringState, last: int):
        self.state, self.last = state, last
        self.end: Tensor | None = None  # position after the chunk, set by the last layer

    def attend_own(
        self, layer: LayerPlan, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms, rope: Rope,
        pos: Tensor,
    ) -> Tensor:  # fmt: skip
        if layer.layer != self.last:
            return self.state.attend_own(layer, q, k, v, norms, rope, pos)
        self.end = self.state.store(layer, k, v, norms, rope, pos)
        return q

    def attend_shared(
        self, layer: LayerPlan, q: Tensor, norms: HeadNorms, rope: Rope, pos: Tensor
    ) -> Tensor:
        return self.state.attend_shared(layer, q, norms, rope, pos)
