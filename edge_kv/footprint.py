"""Which model fits where: what it needs, devices of several sizes, and the longest context of each.

The engine is onnxruntime with native operators, which maps the weight file: anonymous memory holds
programs, state that was written, workspace and the tokenizer; file pages hold the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edge_kv import models
from edge_kv.memory import Base, MemoryPlan, predict
from edge_kv.models.model import Model, Row
from edge_kv.needs import Needs, count_needs
from edge_kv.plan import Plan


@dataclass(frozen=True)
class Footprint:
    """Bytes of one model at one depth of context."""

    quant: str
    needs: Needs
    memory: MemoryPlan
    read_state: int  # a decoded token reads of the state

    @property
    def depth(self) -> int:
        return self.memory.depth

    @property
    def weight_file(self) -> int:
        return self.needs.weight_file

    @property
    def anonymous(self) -> int:
        """Heap and state while tokens are decoded."""
        return self.memory.phases["decode"].anon

    @property
    def experts(self) -> int:
        """All routed experts: mapped pages of which a token reads a few."""
        return self.needs.experts

    @property
    def read_experts(self) -> int:
        """A decoded token reads of them."""
        return self.needs.read_experts

    @property
    def resident(self) -> int:
        """Memory with which no token waits for storage."""
        return self.memory.conversation

    @property
    def least(self) -> int:
        """Memory with which only experts come from storage."""
        return self.resident - self.needs.experts


def footprint(
    config: Model, plan: Plan, quant: str = "int4", *, formats: Mapping[str, str] | None = None,
    depth: int | None = None, base: Base | None = None, drafter: Model | None = None,
) -> Footprint:  # fmt: skip
    """What `config` needs under `plan`, with weights stored as `quant`.

    Args:
        formats: weight formats by kind of tensor; those of the scheme when left out.
        depth: tokens of context in use; the whole context when left out.
        base: what a process holds before it opens a model; typical figures when left out.
        drafter: what drafts for the model, which takes memory too.

    Raises:
        ConfigError: an unknown quantisation.
    """
    needs = count_needs(config, quant, formats, drafter)
    memory = predict(needs, plan, config.vocab, depth, base=base)
    return Footprint(quant, needs, memory, plan.read_traffic(memory.depth))


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
