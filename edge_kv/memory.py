"""Predicted memory: weight files, state, and peak RAM of each phase, before anything is built.

Anonymous memory (heap, state) cannot be reclaimed; file memory is mapped weights, clean pages the
kernel may drop. The model below is how onnxruntime's CPU provider was seen to behave: every program
packs its matrices on the heap when it is loaded and keeps the original scales mapped; state costs
RAM as far as rows were written; token lookups map pages of the embedding; arenas keep the largest
workspace they ever needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge_kv.config import ModelConfig
from edge_kv.errors import ConfigError
from edge_kv.kv_plan import APPEND, RING, KVPlan
from edge_kv.tensors import (
    EMBED,
    EXPERT,
    FLOAT,
    PLE_TABLE,
    TensorSpec,
    block_for,
    stored_bits,
    tensor_table,
)

PLE_BLOCK = 32  # values that share a scale in the PLE file
SCALE_BYTES = 4  # weight scales are f32
PACKED_SCALE_BYTES = 8  # a packed block carries its f32 scale and its f32 sum
BASE_ANON = 44 << 20  # interpreter, numpy, onnxruntime: heap
BASE_FILE = 46 << 20  # … and their mapped libraries
TOKENIZER_BYTES = 1152  # heap of the tokenizers library for each entry of the vocabulary
LOOKUP_BYTES = 148_000  # file pages mapped around one looked-up row of the token table
# Workspace, in f32 copies that an arena has held at once (fitted to Gemma 3 270M, chunk 128):
ACTIVATIONS = 16  # rows of the widest layer
RING_SCORES = 8  # scores of one sliding layer [q_heads, rows, slots]
FLOAT_ROWS = 3  # live rows of one full layer, K or V, turned into float for a chunk
LOGITS = 4  # the row of logits


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
    """Where the bytes of one export lie, on disk and in RAM at `depth` tokens of context."""

    quant: str
    block_size: int
    depth: int
    weights: dict[str, int]  # bytes in the weight file by tensor kind
    ple_file: int
    tokenizer: int  # heap; a session that is fed ids alone does without
    state: int  # allocated
    touched: int  # of it, holding rows at `depth`
    phases: dict[str, Phase]  # load, prefill, decode

    @property
    def weight_file(self) -> int:
        return sum(self.weights.values())

    @property
    def peak(self) -> int:
        """Highest total of all phases."""
        return max(p.total for p in self.phases.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything above, in bytes."""
        return {
            "quant": self.quant,
            "block_size": self.block_size,
            "depth": self.depth,
            "weight_file": self.weight_file,
            "weights": self.weights,
            "ple_file": self.ple_file,
            "tokenizer": self.tokenizer,
            "state": self.state,
            "state_touched": self.touched,
            "peak": self.peak,
            "phases": {
                name: {"anon": p.anon, "file": p.file, "total": p.total}
                for name, p in self.phases.items()
            },
        }


def predict_memory(
    config: ModelConfig,
    plan: KVPlan,
    quant: str = "int4",
    block_size: int = 32,
    depth: int | None = None,
) -> MemoryPlan:
    """Predict files and peak RAM for `plan` with weights stored as `quant` in `block_size` blocks.

    `depth` is how many tokens of context are used; the whole context when left out.

    Raises:
        ConfigError: an unknown quantisation.
    """
    depth = plan.ctx if depth is None else min(depth, plan.ctx)
    kinds: dict[str, int] = {}
    packed = mapped = 0
    for spec in tensor_table(config):
        if spec.kind == PLE_TABLE:
            continue
        stored, heap, kept = _tensor_bytes(spec, quant, block_size)
        kinds[spec.kind] = kinds.get(spec.kind, 0) + stored
        programs = _programs(config, spec)
        packed += heap * programs
        mapped += kept  # both programs map the same file
    touched = plan.touched_bytes(depth)
    tokenizer = TOKENIZER_BYTES * config.vocab_size
    load = Phase(BASE_ANON + tokenizer + packed, BASE_FILE + mapped)
    chunk = _workspace(config, plan, min(plan.chunk, depth), depth)
    step = _workspace(config, plan, 1, depth) + LOGITS * 4 * config.vocab_size
    looked_up = load.file + min(kinds[EMBED], LOOKUP_BYTES * depth)
    return MemoryPlan(
        quant=quant,
        block_size=block_size,
        depth=depth,
        weights=kinds,
        ple_file=_ple_file(config, quant),
        tokenizer=tokenizer,
        state=plan.bytes,
        touched=touched,
        phases={
            "load": load,
            "prefill": Phase(load.anon + touched + chunk, looked_up),
            "decode": Phase(load.anon + touched + chunk + step, looked_up),
        },
    )


def streamed_bytes(config: ModelConfig, quant: str, block_size: int) -> int:
    """Bytes of weights that decoding one token reads: every matrix once, the head included.

    Of routed experts only the chosen ones count; the token table is read as the head, its one
    looked-up row is nothing beside it.
    """
    total = 0
    for spec in tensor_table(config):
        if spec.kind == PLE_TABLE:
            continue
        stored, heap, _ = _tensor_bytes(spec, quant, block_size)
        size = heap or stored
        if spec.kind == EXPERT and config.moe:
            size = size * config.moe.top_k // config.moe.n_experts
        total += size
    return total


def _tensor_bytes(spec: TensorSpec, quant: str, block_size: int) -> tuple[int, int, int]:
    """Bytes of one tensor in the weight file, on the heap of a program, and left mapped."""
    bits = stored_bits(spec.kind, quant)
    block = block_for(spec.shape[-1], block_size) if bits < 32 else 0
    if not block:
        size = 4 * spec.elements
        return (size, 0, size) if spec.kind == FLOAT else (size, size, 0)
    values, blocks = spec.elements * bits // 8, spec.elements // block
    return values + SCALE_BYTES * blocks, values + PACKED_SCALE_BYTES * blocks, SCALE_BYTES * blocks


def _programs(config: ModelConfig, spec: TensorSpec) -> int:
    """How many programs pack a tensor: prefill runs the owning layers and needs no head."""
    if spec.kind == EMBED:
        return 1
    layer = spec.name.split(".")[1] if spec.name.startswith("layers.") else None
    return 1 if layer is not None and not config.owns(int(layer)) else 2


def _ple_file(config: ModelConfig, quant: str) -> int:
    if not config.ple_dim:
        return 0
    values = config.n_layers * config.ple_dim
    bits = stored_bits(PLE_TABLE, quant)
    block = block_for(config.ple_dim, PLE_BLOCK) if bits < 32 else 0
    row = values * bits // 8 + 2 * values // block if block else 4 * values
    return config.vocab_size * row


def _workspace(config: ModelConfig, plan: KVPlan, rows: int, depth: int) -> int:
    """Bytes a program needs beside weights and state to run `rows` tokens at `depth`.

    The widest activations, the scores of a ring layer, and of the largest full layer its scores
    (one token) or its live rows as float (a chunk: the kernel makes no score matrix).
    """
    run = [p for p in plan.layers if rows == 1 or not p.skip_in_prefill]
    widest = max(max(config.mlp(p.layer), p.q_heads * p.head_dim) for p in run)
    rings = [p.q_heads * rows * plan.ring_slots for p in run if p.kind == RING]
    live = plan.live_rows(depth)
    full = [
        p.q_heads * live if rows == 1 else FLOAT_ROWS * live * p.kv_heads * p.head_dim
        for p in run
        if p.kind == APPEND and (rows == 1 or plan.by_name[p.k].dtype != "f32")
    ]
    values = ACTIVATIONS * rows * max(widest, config.hidden)
    values += RING_SCORES * max(rings, default=0) + max(full, default=0)
    return 4 * (values + rows * config.n_layers * config.ple_dim)


def parse_bytes(text: str) -> int:
    """`1500m`, `2g`, `2GiB` or plain bytes as a number of bytes (k, m, g are powers of 1024).

    Raises:
        ConfigError: not a positive number with an optional unit.
    """
    unit = text.strip().lower().removesuffix("b").removesuffix("i")
    factor = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}.get(unit[-1:], 1)
    try:
        size = float(unit[:-1] if factor > 1 else unit) * factor
    except ValueError:
        size = 0.0
    if not 1 <= size < float("inf"):
        raise ConfigError(f"{text!r} is not an amount of memory; write for example 1500m or 2g.")
    return int(size)
