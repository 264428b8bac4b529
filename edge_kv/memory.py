"""Predicted memory of a running model: peak RAM by phase, before anything is built.

    peak of a phase = what the process holds already          measured on this machine
                    + loaded programs, tokenizer, workspace   derived from the model's sizes
                    + state that was written                  the plan

Anonymous memory (heap, state) cannot be reclaimed; file memory is libraries and mapped weights,
clean pages that the kernel may drop and read again. What a process holds before it opens a model
(the interpreter, libraries, a command line's own imports) differs between machines, Pythons and
versions, so it is measured (`runtime.base`); without a measurement typical figures stand in.

What is left is a handful of costs of an engine (`COSTS`) and of the tokenizers library, fitted to
four models and checked on others by benchmarks/memory_model.py.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import expm1
from pathlib import Path
from typing import Any

from edge_kv.errors import ConfigError, did_you_mean
from edge_kv.models.model import Model
from edge_kv.needs import Needs, count_needs
from edge_kv.plan import Plan

TOKENIZER = "tokenizer"  # the phase, after a load, in which the tokenizer is read
PHASES = ("load", TOKENIZER, "prefill", "decode")
CHECKPOINTS = 3  # states of the rings that a conversation keeps at turn boundaries
TOKEN_BYTES = 40  # a session's list of fed ids: one Python integer and its place
ENTRY_BYTES, MERGE_BYTES = 223, 80  # heap of the tokenizers library for an entry, for a merge
ENTRY_READING, MERGE_READING = 266, 551  # … while it reads them
USUAL_MERGES = 2  # merges an entry has where they were not counted; the most that is usual
TOKENIZER_CODE = 5_000_000  # pages of that library
KEPT_CODE = 6_500_000  # … and of all others, once a load has let go of them
KEPT_SHARE = 0.1  # … of what they take beyond that where a touch maps more than 64 KB
LOOKUP_BYTES = 65_536  # file pages mapped around one looked-up row of the token table


@dataclass(frozen=True)
class Base:
    """Bytes a process holds before it opens a model."""

    anon: int
    file: int
    # How often 64 KB doubles to what a touch of a library's file maps, by library; 0 if left out.
    doublings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Costs:
    """What an engine takes for a model, beside weights and state."""

    typical: Base  # where a process cannot be measured
    opened: int  # heap of a session, whatever its model
    layer: int  # … and for each layer of a model, in both programs
    opening: int  # heap beside these that a load takes for a moment: programs as they are read
    running: int  # heap that the first step takes, whatever the model: pools, a thread's stack
    code_opened: int  # pages of libraries that opening a model touches
    code: int  # pages of all libraries that running one touches; a load lets go of them
    doubling: Mapping[str, int]  # … more for each of `Base.doublings`, by library
    copies: float  # of what a chunk of a prompt holds, as it is counted in `needs`
    kept: float  # … of these, beside the tokens that follow a prompt; the others are given back
    logits: float  # rows of logits, f32
    further: float  # … for each further token of a pass: in the program, given out, left behind
    apart: bool  # whether prefill maps the weights for itself

    def spread(self, base: Base) -> int:
        """Pages of libraries that running a model touches here beyond `code`."""
        return round(sum(n * base.doublings.get(name, 0.0) for name, n in self.doubling.items()))


COSTS = {
    "onnx": Costs(
        Base(34_500_000, 33_600_000),
        opened=3_000_000, layer=375_000, opening=1_400_000, running=1_200_000,
        code_opened=8_800_000, code=19_500_000,
        doubling={"onnxruntime": 3_800_000, "numpy": 1_200_000},
        copies=1.33, kept=0.3, logits=1.0, further=2.6, apart=True,
    ),
    "executorch": Costs(
        Base(25_500_000, 24_000_000),
        opened=1_100_000, layer=13_500, opening=0, running=300_000, code_opened=2_300_000,
        code=17_500_000, doubling={"executorch": 1_100_000, "numpy": 1_200_000},
        copies=1.0, kept=0.35, logits=1.0, further=2.0, apart=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """Peak bytes of one phase: anonymous and file-backed."""

    anon: int
    file: int

    @property
    def total(self) -> int:
        return self.anon + self.file


@dataclass(frozen=True)
class MemoryPlan:
    """Where the bytes of one model lie in RAM, with `depth` tokens of context in use."""

    engine: str
    depth: int
    state: int  # allocated
    touched: int  # of it, holding rows at `depth`
    phases: dict[str, Phase]  # in the order in which they come
    parts: dict[str, int]  # anonymous bytes while tokens are decoded, by what holds them
    mapped: dict[str, int]  # file-backed bytes then
    checkpoints: int  # heap of the rings that a conversation keeps at turn boundaries

    @property
    def anonymous(self) -> int:
        """Highest anonymous memory of all phases."""
        return max(p.anon for p in self.phases.values())

    @property
    def stays(self) -> int:
        """Anonymous memory of a conversation while tokens are decoded."""
        return self.phases["decode"].anon + self.checkpoints

    @property
    def peak(self) -> int:
        """Highest total of all phases."""
        return max(p.total for p in self.phases.values())

    @property
    def conversation(self) -> int:
        """`peak` of a conversation, which keeps checkpoints beside the state."""
        running = max(p.total for n, p in self.phases.items() if n not in ("load", TOKENIZER))
        return max(self.peak, running + self.checkpoints)

    @property
    def aside(self) -> int:
        """Heap of another conversation of `depth` tokens, kept beside the one a session holds."""
        return self.touched + self.checkpoints + TOKEN_BYTES * self.depth

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything above, in bytes."""
        return {
            "engine": self.engine,
            "depth": self.depth,
            "state": self.state,
            "state_touched": self.touched,
            "checkpoints": self.checkpoints,
            "aside": self.aside,
            "anonymous": self.anonymous,
            "stays": self.stays,
            "peak": self.peak,
            "conversation": self.conversation,
            "parts": self.parts,
            "mapped": self.mapped,
            "phases": {
                name: {"anon": p.anon, "file": p.file, "total": p.total}
                for name, p in self.phases.items()
            },
        }


def predict(
    needs: Needs, plan: Plan, vocab: int, depth: int | None = None, *, engine: str = "onnx",
    base: Base | None = None, text: bool = True, merges: int | None = None, packed: int = 0,
    drafts: int | None = None, huge: bool = False,
) -> MemoryPlan:  # fmt: skip
    """Peak memory by phase of a session that feeds `depth` tokens, the whole context if left out.

    Args:
        vocab: entries of the vocabulary.
        engine: one of `COSTS`.
        base: what the process holds before; typical figures when left out.
        text: whether a tokenizer is read; a session that is fed ids does without.
        merges: rules of the tokenizer; as many as is usual when left out.
        packed: bytes of weights that the engine brings into another order on the heap.
        drafts: drafts that a pass of decode checks; the most it takes when left out.
        huge: whether the weights are copied into huge pages.

    Raises:
        ConfigError: an engine without costs.
    """
    merges = USUAL_MERGES * vocab if merges is None else merges
    if engine not in COSTS:
        raise ConfigError(
            f"There is no memory plan for engine {engine!r}.{did_you_mean(engine, COSTS)}"
        )
    costs = COSTS[engine]
    base = base or costs.typical
    depth = plan.ctx if depth is None else min(depth, plan.ctx)
    rows = min(plan.chunk, depth)
    layers = 1 + max((r for t in plan.tables for r in t.readers), default=0)
    programs = costs.opened + costs.layer * layers + packed
    tokenizer = ENTRY_BYTES * vocab + MERGE_BYTES * merges if text else 0
    chunk = 4 * rows * needs.row
    work = costs.running + int(costs.kept * chunk + 4 * costs.logits * vocab)
    reading_prompt = int((costs.copies - costs.kept) * chunk)
    checked = plan.drafts if drafts is None else drafts
    checking = int(4 * costs.further * vocab * checked)
    touched, ids = plan.touched(depth), TOKEN_BYTES * depth
    parts = {
        "Python and libraries": base.anon, "programs": programs, "tokenizer": tokenizer,
        "state": touched + ids, "workspace": work + checking,
    }  # fmt: skip
    weights = needs.dense + needs.experts
    copied = weights if huge else 0
    if copied:
        parts["weights in huge pages"] = copied
    reader = TOKENIZER_CODE if text else 0
    spread = costs.spread(base)
    opened, code = base.file + costs.code_opened, costs.code + spread + reader
    lookup = _touched(needs.weights.get("embed", 0), LOOKUP_BYTES, depth)
    prefill = 0 if huge and not costs.apart else min(needs.prefill + lookup, weights)
    mapped = {"libraries": code, "weights": needs.dense, "experts": needs.experts}
    if copied:
        mapped |= {"weights": 0, "experts": 0}
    loaded = base.anon + programs + copied
    running = sum(parts.values())
    phases = {"load": Phase(loaded + costs.opening, opened)}
    if text:
        reading = ENTRY_READING * vocab + MERGE_READING * merges
        phases[TOKENIZER] = Phase(loaded + reading, KEPT_CODE + int(KEPT_SHARE * spread) + reader)
    phases["prefill"] = Phase(running - checking + reading_prompt, code + prefill)
    phases["decode"] = Phase(running, code + max(weights - copied, prefill))
    kept = CHECKPOINTS * sum(t.bytes for t in plan.tables if t.keep)
    return MemoryPlan(engine, depth, plan.bytes, touched, phases, parts, mapped, kept)


def _touched(whole: int, around: int, count: int) -> int:
    """Bytes of a file of `whole` bytes that `count` accesses anywhere map, `around` bytes each."""
    return round(whole * -expm1(-count * around / whole)) if whole else 0


def predict_memory(
    config: Model, plan: Plan, quant: str = "int4", formats: Mapping[str, str] | None = None,
    depth: int | None = None, *, engine: str = "onnx", base: Base | None = None,
) -> MemoryPlan:  # fmt: skip
    """`predict` of a model that is not exported yet.

    Raises:
        ConfigError: an unknown quantisation or engine.
    """
    needs = count_needs(config, quant, formats)
    return predict(needs, plan, config.vocab, depth, engine=engine, base=base)


def predict_artifact(
    artifact: Any, depth: int | None = None, *, engine: str = "onnx", base: Base | None = None,
    text: bool = True, drafts: int | None = None, huge: bool = False,
) -> MemoryPlan:  # fmt: skip
    """`predict` of an artifact, from what its exporter counted.

    Raises:
        ConfigError: an engine without costs.
    """
    needs, plan = needs_of(artifact), artifact.plan
    vocab, tokenizer = artifact.tokens.vocab, artifact.manifest.tokenizer
    merges = count_merges(artifact.root / tokenizer.file) if text and tokenizer else 0
    text = text and tokenizer is not None
    backend = artifact.manifest.backends.get(engine)
    portable = backend is not None and backend.details.get("attention") == "portable"
    return predict(
        needs, plan, vocab, depth, engine=engine, base=base, text=text, merges=merges,
        packed=needs.dense if portable else 0, drafts=0 if portable else drafts, huge=huge,
    )  # fmt: skip


@cache
def count_merges(path: Path) -> int | None:
    """Merges of a BPE tokenizer.json, from its quotes alone; None where it has none to count.

    A merge is one string (`"a b"`) or two (`["a", "b"]`). The file is mapped, never on the heap.
    """
    try:
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as text:
            at = text.rfind(b'"merges"')
            if at < 0:
                return None
            listed = text[at + len(b'"merges"') : at + 64].split(b"[", 1)[-1].lstrip()
            quotes = escaped = 0
            for start in range(at + len(b'"merges"'), len(text), 1 << 20):
                block = text[start : start + (1 << 20)]
                quotes, escaped = quotes + block.count(b'"'), escaped + block.count(b'\\"')
    except (OSError, ValueError):  # missing, or empty
        return None
    return (quotes - escaped) // (4 if listed.startswith(b"[") else 2)


def needs_of(artifact: Any) -> Needs:
    """What an artifact's manifest says of its weights."""
    manifest = artifact.manifest
    lookup = manifest.files[manifest.ple.file].size if manifest.ple else 0
    return Needs(**manifest.needs.model_dump(), lookup_file=lookup)


def read_weights(artifact: Any) -> int:
    """Bytes of weights that decoding one token reads."""
    return needs_of(artifact).read_weights


UNPLANNED = (
    "What stock operators take is not planned: as it loads a program, their engine decides how to "
    "rewrite it and how much memory to work in."
)


def with_margin(planned: int) -> int:
    """`planned` bytes and what a plan may be wrong by: 5 % or 5 MB, the larger."""
    return planned + max(planned // 20, 5_000_000)
