"""What any model needs, from its plan and its weight rows alone: files, memory, bytes a token.

The engine is onnxruntime with native operators, which maps the weight file: anonymous memory holds
graphs, state that was written, workspace and the tokenizer; file pages hold the weights. Constants
are those of `edge_kv.memory`, fitted to Gemma.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from edge_kv import models
from edge_kv.memory import (
    BASE_ANON,
    BASE_FILE,
    OPERATORS_ACTIVATIONS,
    OPERATORS_GRAPH,
    OPERATORS_LOGITS,
    TOKEN_BYTES,
    TOKENIZER_BYTES,
)
from edge_kv.models.model import EXPERT, EXPERT8, FLOAT, PLE_TABLE, TABLE, Model, Row, Weight
from edge_kv.plan import Plan
from edge_kv.tensors import PLE_BITS, PLE_BLOCK, stored_format, stored_shape, weight_formats

PROGRAMS = 2  # prefill and decode


@dataclass(frozen=True)
class Footprint:
    """Bytes of one model at `depth` tokens of context."""

    quant: str
    depth: int
    weights: dict[str, int]  # in the weight file, by kind
    lookup_file: int  # per-layer token rows: a file of its own, read row by row
    state: int  # allocated
    touched: int  # of it, holding rows at `depth`
    anonymous: int  # peak of a session that has read its tokenizer
    dense: int  # weights that every token reads: mapped pages to keep
    experts: int  # all routed experts: mapped pages of which a token reads a few
    read_weights: int  # a decoded token reads of the weights
    read_state: int  # … and of the state
    read_experts: int  # what of the weights read are routed experts: a token's cycle

    @property
    def weight_file(self) -> int:
        return sum(self.weights.values())

    @property
    def resident(self) -> int:
        """Memory with which no token waits for storage."""
        return self.anonymous + BASE_FILE + self.dense + self.experts

    @property
    def least(self) -> int:
        """Memory with which only experts come from storage."""
        return self.anonymous + BASE_FILE + self.dense


def stored_bytes(weight: Weight, quant: str, formats: Mapping[str, str] | None = None) -> int:
    """Bytes of one weight in its file; `formats` are those of the scheme when left out."""
    if weight.kind == TABLE:
        return 8 * weight.elements
    if weight.kind == PLE_TABLE and PLE_BITS[quant] < 32 and weight.shape[-1] % PLE_BLOCK == 0:
        return weight.elements * PLE_BITS[quant] // 8 + 2 * (weight.elements // PLE_BLOCK)
    formats = weight_formats(quant) if formats is None else formats
    fmt = stored_format(weight.kind, weight.shape, formats)
    return prod(stored_shape(fmt, weight.shape)) if fmt else 4 * weight.elements


def footprint(
    config: Model, plan: Plan, quant: str = "int4", *, formats: Mapping[str, str] | None = None,
    depth: int | None = None,
) -> Footprint:  # fmt: skip
    """What `config` needs under `plan`, with weights stored as `quant`; `formats` as above.

    Raises:
        ConfigError: an unknown quantisation.
    """
    depth = plan.ctx if depth is None else min(depth, plan.ctx)
    formats = weight_formats(quant) if formats is None else formats
    kinds: dict[str, int] = {}
    lookup = dense = experts = read = cycle = 0
    for weight in models.weights(config):
        size = stored_bytes(weight, quant, formats)
        if weight.kind == PLE_TABLE:
            lookup = size
            continue
        kinds[weight.kind] = kinds.get(weight.kind, 0) + size
        read += round(size * weight.share)
        if weight.kind in (EXPERT, EXPERT8):
            experts += size
            cycle += round(size * weight.share)
        elif weight.share:
            dense += size
    rows = min(plan.chunk, depth or plan.chunk)
    work = OPERATORS_ACTIVATIONS * rows * _widest(config) + OPERATORS_LOGITS * config.vocab
    anonymous = BASE_ANON + PROGRAMS * OPERATORS_GRAPH * config.layers + int(4 * work)
    anonymous += TOKENIZER_BYTES * config.vocab + TOKEN_BYTES * depth + plan.touched(depth)
    return Footprint(
        quant=quant, depth=depth, weights=kinds, lookup_file=lookup, state=plan.bytes,
        touched=plan.touched(depth), anonymous=anonymous, dense=dense, experts=experts,
        read_weights=read, read_state=plan.read_traffic(depth),
        read_experts=cycle,
    )  # fmt: skip


@dataclass(frozen=True)
class Streaming:
    """What a memory limit costs a mixture whose experts do not all fit under it, in bytes."""

    limit: int
    bank: int  # of experts held in memory
    storage: int  # read from storage for a token, experts chosen alike
    cliff: int  # the least limit under which some of a token's experts are still held at the next

    @property
    def held(self) -> bool:
        """Whether the bank holds more than one token's experts."""
        return self.limit >= self.cliff


def streaming(need: Footprint, limit: int) -> Streaming:
    """What a token of `need` reads from storage under `limit` bytes of memory.

    The bank holds what was used last. Where every expert of a layer is as likely as another, one
    is found in it with the probability bank / experts, as long as the bank holds what one token
    reads; below that, all of it is replaced before any is used again.
    """
    bank = min(max(0, limit - need.least), need.experts)
    cliff = need.least + need.read_experts
    found = bank / need.experts if need.experts and limit >= cliff else 0.0
    return Streaming(limit, bank, round(need.read_experts * (1 - found)), cliff)


def _widest(config: Model) -> int:
    """Widest row of activations in a chunk of a prompt."""
    return max(
        w.shape[-2]
        for w in models.weights(config)
        if len(w.shape) > 1 and w.prefill and w.kind not in (FLOAT, TABLE)
    )


@dataclass(frozen=True)
class DeviceClass:
    """Boards, phones and laptops of one size; `kept` is what a program cannot have."""

    name: str
    ram: int
    kept: int  # by the system and what else runs

    @property
    def free(self) -> int:
        return self.ram - self.kept


GIB = 1 << 30
DEVICES = (
    DeviceClass("Pi 4/5, 4 GB", 4 * GIB, GIB // 2),
    DeviceClass("Pi 4/5, 8 GB", 8 * GIB, GIB // 2),
    DeviceClass("phone, 8 GB", 8 * GIB, 4 * GIB),
    DeviceClass("phone, 12 GB", 12 * GIB, 5 * GIB),
    DeviceClass("laptop, 16 GB", 16 * GIB, 4 * GIB),
)
CONTEXTS = (4096, 16_384, 32_768, 65_536, 131_072, 262_144, 1_048_576)
RESIDENT, FLASH, NO = "in memory", "experts from storage", "no"


@dataclass(frozen=True)
class Fit:
    """How a model runs on a device: in memory, with its experts read from storage, or not."""

    model: str
    device: DeviceClass
    verdict: str
    ctx: int  # the longest context that fits so; 0 where none does
    need: Footprint  # at that context, or at the shortest where none fits


def fits(
    rows: Iterable[tuple[str, Row]], devices: Sequence[DeviceClass] = DEVICES,
    quant: str = "int4", kv: str = "int8",
) -> list[Fit]:  # fmt: skip
    """Each model on each device, with the longest context of `CONTEXTS` that fits."""
    out = []
    for name, row in rows:
        config = row.config
        ladder = sorted({c for c in CONTEXTS if c <= config.max_ctx} | {config.max_ctx})
        needs = [footprint(config, models.plan(config, ctx=c, kv=kv), quant) for c in ladder]
        out += [_fit(name, device, needs) for device in devices]
    return out


def _fit(name: str, device: DeviceClass, needs: Sequence[Footprint]) -> Fit:
    """`needs` are those of rising contexts."""
    resident = [n for n in needs if n.resident <= device.free]
    if resident:
        return Fit(name, device, RESIDENT, resident[-1].depth, resident[-1])
    streamed = [n for n in needs if n.least <= device.free and n.experts]
    if streamed:
        return Fit(name, device, FLASH, streamed[-1].depth, streamed[-1])
    return Fit(name, device, NO, 0, needs[0])
