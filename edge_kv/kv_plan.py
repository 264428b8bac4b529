"""The KV plan: the only code that knows a state buffer's name, shape, dtype, owner and bytes.

Every piece of decode state is a table of rows addressed by absolute position, `slot = pos % slots`.
Masks come from positions too, so `pos` is the only mutable scalar: chunked prefill, ring wrap and
rollback are all "write, then mask". Exporters, runtimes, `plan`, `inspect` and Android read this
plan and compute no shape of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from edge_kv.config import FULL, ModelConfig
from edge_kv.errors import PlanError, did_you_mean

DTYPE_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}
KV_STORAGES = ("f32", "f16", "int8")
APPEND, RING = "append", "ring"
LIVE_STEP = 256  # append buffers are bound as prefix views of a multiple of this many rows


@dataclass(frozen=True)
class StateBuffer:
    """One preallocated state tensor [heads, slots, dim] (scales: [heads, slots]), row-major."""

    name: str  # "k14", "v14"; int8 rows have their scales in "k14.scale"
    role: str  # "k" | "v" | "k.scale" | "v.scale"
    kind: str  # "append" (slots = ctx) | "ring" (slots = window + chunk - 1)
    shape: tuple[int, ...]
    dtype: str
    writer: int  # the one layer that writes it
    readers: tuple[int, ...]  # every layer that attends over it, the writer included

    @property
    def heads(self) -> int:
        return self.shape[0]

    @property
    def slots(self) -> int:
        return self.shape[1]

    @property
    def row_bytes(self) -> int:
        """Bytes of one position, all heads."""
        return self.heads * prod(self.shape[2:]) * DTYPE_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        return self.slots * self.row_bytes


@dataclass(frozen=True)
class LayerPlan:
    """What one layer writes, reads and masks."""

    layer: int
    kind: str
    source: int  # layer whose buffers are read
    window: int  # 0: causal over everything; W: positions pos-W+1 … pos
    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    owns: bool
    skip_in_prefill: bool  # sharing layers write no state: prompt tokens need not pass them

    @property
    def k(self) -> str:
        return f"k{self.source}"

    @property
    def v(self) -> str:
        return f"v{self.source}"


@dataclass(frozen=True)
class KVPlan:
    """All state of one exported model at one context length."""

    ctx: int
    chunk: int
    kv: str  # storage asked for: f32 | f16 | int8 (int8 leaves the rings in f32)
    window: int
    buffers: tuple[StateBuffer, ...]
    layers: tuple[LayerPlan, ...]

    @cached_property
    def by_name(self) -> dict[str, StateBuffer]:
        return {b.name: b for b in self.buffers}

    @property
    def bytes(self) -> int:
        return sum(b.bytes for b in self.buffers)

    @property
    def ring_slots(self) -> int:
        """Slots of every ring; 0 when no layer slides."""
        return next((b.slots for b in self.buffers if b.kind == RING), 0)

    def touched_bytes(self, depth: int) -> int:
        """Bytes of state that hold rows once `depth` positions were written."""
        return sum(min(depth, b.slots) * b.row_bytes for b in self.buffers)

    def ring_bytes(self, depth: int) -> int:
        """Bytes of the rings that hold rows once `depth` positions were written."""
        return sum(min(depth, b.slots) * b.row_bytes for b in self.buffers if b.kind == RING)

    def live_rows(self, end: int) -> int:
        """Rows of an append buffer to bind so that positions below `end` are in view."""
        return min(self.ctx, -(-end // LIVE_STEP) * LIVE_STEP)

    def read_traffic(self, depth: int) -> int:
        """Bytes of state one decoded token reads at `depth` positions: each reader reads anew."""
        total = 0
        for b in self.buffers:
            rows = min(depth, self.window) if b.kind == RING else min(depth, self.ctx)
            total += len(b.readers) * rows * b.row_bytes
        return total

    def oldest_retained(self, written: int) -> int:
        """First position that every ring still holds after positions 0 … written-1 were written."""
        return max(0, written - self.ring_slots) if self.ring_slots else 0

    def can_rewind(self, to: int, written: int) -> bool:
        """Whether decoding may go on at `to` after `written` positions were written.

        The next query at `to` looks back to `to - window + 1`; a ring holds the last `slots` rows.
        """
        if not 0 <= to <= written:
            return False
        oldest = self.oldest_retained(written)
        return oldest == 0 or to == 0 or to - self.window + 1 >= oldest

    def validate(self) -> None:
        """Refuse a plan that could lose a key.

        Raises:
            PlanError: a ring too short for window + chunk - 1, a reader before its writer, a
                buffer written twice, or state that some layer reads and nobody owns.
        """
        seen: set[str] = set()
        for b in self.buffers:
            if b.name in seen:
                raise PlanError(f"Buffer {b.name} is planned twice; every buffer has one writer.")
            seen.add(b.name)
            need = min(self.ctx, self.window + self.chunk - 1) if b.kind == RING else self.ctx
            if b.slots < need:
                raise PlanError(
                    f"Buffer {b.name} has {b.slots} slots but a {b.kind} needs {need}: "
                    f"the oldest key of a chunk would be overwritten."
                )
            if not b.readers or min(b.readers) < b.writer:
                raise PlanError(f"Buffer {b.name} is read before layer {b.writer} writes it.")
        for b in self.buffers:
            if b.dtype == "int8" and f"{b.name}.scale" not in seen:
                raise PlanError(
                    f"Buffer {b.name} holds int8 rows but {b.name}.scale is not planned."
                )
        for layer in self.layers:
            for name in (layer.k, layer.v):
                if name not in seen:
                    raise PlanError(f"Layer {layer.layer} reads {name}, which no layer writes.")


def plan_kv(config: ModelConfig, *, ctx: int, chunk: int = 128, kv: str = "int8") -> KVPlan:
    """Lay out the state of `config` for `ctx` positions and prompt chunks of at most `chunk`.

    Ring slots are min(ctx, window + chunk - 1): with write-then-attend, the first query of a chunk
    still needs the window-1 keys before it (executorch issue 22358; architectures.md §1c).

    Raises:
        PlanError: ctx or chunk out of range, or an unknown `kv` storage.
    """
    if kv not in KV_STORAGES:
        raise PlanError(f"Unknown KV storage {kv!r}.{did_you_mean(kv, KV_STORAGES)}")
    if not 1 <= ctx <= config.max_ctx:
        raise PlanError(
            f"ctx {ctx} is outside 1 … {config.max_ctx}, the positions this model was made for."
        )
    if chunk < 1:
        raise PlanError(f"chunk {chunk} must be at least 1 token.")
    chunk = min(chunk, ctx)
    window = min(config.sliding_window, ctx)
    layers = tuple(_layer_plan(config, i, window) for i in range(config.n_layers))
    buffers: list[StateBuffer] = []
    for layer in layers[: config.n_own]:
        readers = tuple(r.layer for r in layers if r.source == layer.layer)
        ring = layer.kind == RING
        slots = min(ctx, window + chunk - 1) if ring else ctx
        dtype = "f32" if ring and kv == "int8" else kv
        table = (layer.kv_heads, slots)
        for role in ("k", "v"):
            name = f"{role}{layer.layer}"
            rows = (*table, layer.head_dim)
            buffers.append(StateBuffer(name, role, layer.kind, rows, dtype, layer.layer, readers))
            if dtype == "int8":
                buffers.append(
                    StateBuffer(
                        f"{name}.scale", f"{role}.scale", layer.kind, table, "f32", layer.layer,
                        readers,
                    )
                )  # fmt: skip
    plan = KVPlan(ctx, chunk, kv, window, tuple(buffers), layers)
    plan.validate()
    return plan


def _layer_plan(config: ModelConfig, i: int, window: int) -> LayerPlan:
    spec = config.spec(i)
    full = config.pattern[i] == FULL
    return LayerPlan(
        layer=i,
        kind=APPEND if full else RING,
        source=config.source(i),
        window=0 if full else window,
        q_heads=spec.q_heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        scale=config.attention_scale,
        owns=config.owns(i),
        skip_in_prefill=not config.owns(i),
    )


@dataclass(frozen=True)
class StateView:
    """How a graph sees a buffer: its input name (the output is `name + ".out"`).

    A ring is bound whole as [1, heads, slots, dim]. An append buffer is bound one head at a time
    as a prefix [1, live, dim] (scales [1, live]), so that cost follows the live length, not ctx;
    rows of one head are contiguous, rows of all heads are not.
    """

    name: str
    buffer: StateBuffer
    head: int | None

    @property
    def shape(self) -> tuple[int | str, ...]:
        if self.head is None:
            return (1, *self.buffer.shape)
        return (1, "live", *self.buffer.shape[2:])


def state_views(plan: KVPlan) -> tuple[StateView, ...]:
    """Graph inputs and outputs for the state, in plan order: the only source of their names."""
    views: list[StateView] = []
    for b in plan.buffers:
        if b.kind == RING:
            views.append(StateView(b.name, b, None))
        else:
            views += [StateView(f"{b.name}.h{h}", b, h) for h in range(b.heads)]
    return tuple(views)


def state_elements(config: ModelConfig, ctx: int, *, sharing: bool, rings: bool) -> int:
    """Elements of K and V with or without cross-layer sharing and with or without rings.

    `rings` counts window rows a sliding layer (no chunk slack): the published reference totals.
    (False, False) is what a runtime that ignores both stores; architectures.md §6.
    """
    total = 0
    for i in range(config.n_own if sharing else config.n_layers):
        sliding = rings and config.pattern[i] != FULL
        total += 2 * config.spec(i).kv_width * (min(ctx, config.sliding_window) if sliding else ctx)
    return total
