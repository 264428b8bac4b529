"""Predicted memory: weight files, state, and peak RAM of each phase, before anything is built.

Anonymous memory (heap, state) cannot be reclaimed; file memory is mapped weights, clean pages the
kernel may drop. State costs RAM as far as rows were written; token lookups map pages of the
embedding; arenas keep the largest workspace they ever needed. With native operators onnxruntime
maps the weights as they were exported and makes no score matrix. As it is installed, it packs
matrices for the CPU, once, into a cache file that every later load maps (or, without a cache, on
the heap of every program); a load still packs each matrix for a moment to find it in the file.
ExecuTorch differs from native operators in the libraries it brings, in its workspace, and in
mapping the weights once for both programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from edge_kv.config import ModelConfig
from edge_kv.formats import BLOCK
from edge_kv.kv_plan import APPEND, RING, KVPlan, LayerPlan
from edge_kv.tensors import (
    EMBED,
    EXPERT,
    FLOAT,
    PLE_BITS,
    PLE_BLOCK,
    PLE_TABLE,
    TensorSpec,
    stored_format,
    stored_shape,
    tensor_table,
    weight_formats,
)

FIRST_LOAD = "first load"  # the phase in which weights are packed for the device
TOKENIZER = "tokenizer"  # the phase, after a load, in which the tokenizer is read
CHECKPOINTS = 3  # states of the rings that a conversation keeps at turn boundaries
PACKED_SCALE_BYTES = 8  # a packed block carries its f32 scale and its f32 sum
BASE_ANON = 32_500_000  # interpreter, numpy, onnxruntime: heap
BASE_FILE = 46 << 20  # … and their mapped libraries
GRAPH_BYTES = 440_000  # heap of one layer in one program: nodes, kernels, names
PACKING = 1.55  # times the largest packed matrix: what a load takes for a moment
FIRST_PACKING = 1.17  # times all packed matrices of decode: what the load that writes them takes
TOKENIZER_BYTES = 380  # heap of the tokenizers library for each entry of the vocabulary
TOKENIZER_READING = 1410  # … while it reads them
LOOKUP_BYTES = 148_000  # file pages mapped around one looked-up row of the token table
HEAD_PARTS = 8  # the head is packed in row blocks
# Workspace, in f32 copies that an arena has held at once (fitted to E2B and E4B):
ACTIVATIONS = 9  # rows of the widest layer
RING_SCORES = 6  # scores of one sliding layer [q_heads, rows, slots]
FULL_SCORES = 3  # scores of one full layer and a chunk over a block of rows [q_heads, rows, rows]
STEP_SCORES = 6  # scores of one full layer and one token over all live rows [q_heads, live]
FLOAT_ROWS = 3  # rows of one full layer, K or V, turned into float for a chunk
ATTEND_BLOCK = 1024  # rows a chunk turns into float at a time
LOGITS = 2  # the row of logits
TOKEN_BYTES = 40  # a session's list of fed ids: one Python integer and its place
# onnxruntime with native operators (fitted to E2B and E4B):
OPERATORS_GRAPH = 393_000  # heap of one layer in one program
OPERATORS_ACTIVATIONS = 5.4  # f32 copies of a chunk's widest rows
OPERATORS_LOGITS = 16.3  # rows of logits: the head's parts, their softcap, an arena that doubles
# ExecuTorch with native programs (fitted to E2B and tiny):
NATIVE_ANON = 25_500_000  # interpreter, numpy, our library: heap
NATIVE_FILE = 24 << 20  # … and the mapped libraries
NATIVE_GRAPH = 92_000  # heap of one layer in one program
NATIVE_ACTIVATIONS = 6.3  # f32 copies of the rows of the widest layer, products' scratch included
NATIVE_QUERY_BLOCK = 64  # query rows of one attention task, which keeps their sums


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
    formats: dict[str, str]  # of each kind of tensor
    depth: int
    weights: dict[str, int]  # bytes in the weight file by tensor kind
    ple_file: int
    tokenizer: int  # heap; a session that is fed ids alone does without
    state: int  # allocated
    touched: int  # of it, holding rows at `depth`
    phases: dict[str, Phase]  # (first load,) load, tokenizer, prefill, decode
    checkpoints: int = 0  # heap of the rings that a conversation keeps at turn boundaries

    @property
    def weight_file(self) -> int:
        return sum(self.weights.values())

    @property
    def peak(self) -> int:
        """Highest total of all phases of a start with packed weights, or without a cache."""
        return max(p.total for n, p in self.phases.items() if n != FIRST_LOAD)

    @property
    def conversation(self) -> int:
        """`peak` of a conversation, which keeps checkpoints beside the state."""
        return self.peak + self.checkpoints

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything above, in bytes."""
        return {
            "quant": self.quant,
            "formats": self.formats,
            "depth": self.depth,
            "weight_file": self.weight_file,
            "weights": self.weights,
            "ple_file": self.ple_file,
            "tokenizer": self.tokenizer,
            "state": self.state,
            "state_touched": self.touched,
            "checkpoints": self.checkpoints,
            "peak": self.peak,
            "phases": {
                name: {"anon": p.anon, "file": p.file, "total": p.total}
                for name, p in self.phases.items()
            },
        }


def predict_artifact(
    artifact: Any, depth: int | None = None, *, cache: bool = True, engine: str = "onnx"
) -> MemoryPlan:
    """`predict_memory` of an artifact; of schema 2, from what its exporter counted.

    Those numbers are of onnxruntime with native operators, whatever the engine.
    """
    manifest, plan = artifact.manifest, artifact.plan
    quant = manifest.quant
    if artifact.config is not None:
        return predict_memory(
            artifact.config, plan, quant.scheme, quant.formats, depth, cache=cache, engine=engine
        )
    depth = plan.ctx if depth is None else min(depth, plan.ctx)
    needs, vocab = manifest.needs, artifact.tokens.vocab
    tokenizer = TOKENIZER_BYTES * vocab
    loaded = Phase(needs.anonymous + tokenizer, BASE_FILE)
    running = Phase(
        loaded.anon + plan.touched(depth) + TOKEN_BYTES * depth,
        BASE_FILE + needs.dense + needs.experts,
    )
    return MemoryPlan(
        quant=quant.scheme,
        formats=quant.formats,
        depth=depth,
        weights=needs.weights,
        ple_file=manifest.files[manifest.ple.file].size if manifest.ple else 0,
        tokenizer=tokenizer,
        state=plan.bytes,
        touched=plan.touched(depth),
        phases={
            "load": loaded,
            TOKENIZER: Phase(needs.anonymous + TOKENIZER_READING * vocab, BASE_FILE),
            "prefill": running,
            "decode": running,
        },
        checkpoints=CHECKPOINTS * sum(t.bytes for t in plan.tables if t.keep),
    )


def read_weights(artifact: Any) -> int:
    """Bytes of weights that decoding one token reads."""
    if artifact.config is None:
        return int(artifact.manifest.needs.read_weights)
    return streamed_bytes(artifact.config, artifact.manifest.quant.formats)


def predict_memory(
    config: ModelConfig,
    plan: KVPlan,
    quant: str = "int4",
    formats: Mapping[str, str] | None = None,
    depth: int | None = None,
    *,
    cache: bool = True,
    engine: str = "onnx",
) -> MemoryPlan:
    """Predict files and peak RAM for `plan` with weights stored as `quant`.

    `formats` are the weight formats by kind of tensor; those of the scheme when left out.
    `depth` is how many tokens of context are used; the whole context when left out. `cache` means
    weights packed for the device by an earlier load; phase `FIRST_LOAD` is that earlier load. An
    engine that is not in `ENGINES` is taken for onnx.

    Raises:
        ConfigError: an unknown quantisation.
    """
    depth = plan.ctx if depth is None else min(depth, plan.ctx)
    formats = weight_formats(quant) if formats is None else formats
    kinds: dict[str, int] = {}
    packed, mapped = (dict.fromkeys(_PROGRAMS, 0) for _ in range(2))  # of each program
    largest = kept = 0
    for spec in tensor_table(config):
        if spec.kind == PLE_TABLE:
            continue
        stored, heap = _tensor_bytes(spec, formats)
        kinds[spec.kind] = kinds.get(spec.kind, 0) + stored
        for program, rows in _programs(config, spec).items():
            packed[program] += int(heap * rows)
            mapped[program] += int(stored * rows)
        largest = max(largest, heap // HEAD_PARTS if spec.kind == EMBED else heap)
        kept += stored if spec.kind == FLOAT else 0  # both programs map the same file
    touched = plan.touched_bytes(depth)
    tokenizer = TOKENIZER_BYTES * config.vocab_size
    weights = _Weights(packed, mapped, largest, kept, kinds[EMBED])
    phases = ENGINES.get(engine, _onnx)(config, plan, depth, weights, cache)
    reading = phases["load"].anon + TOKENIZER_READING * config.vocab_size
    held = tokenizer + TOKEN_BYTES * depth
    loads = {n: Phase(p.anon + tokenizer, p.file) for n, p in phases.items() if n not in RUNNING}
    runs = {n: Phase(p.anon + held, p.file) for n, p in phases.items() if n in RUNNING}
    phases = {**loads, TOKENIZER: Phase(reading, phases["load"].file), **runs}
    return MemoryPlan(
        quant=quant,
        formats=dict(formats),
        depth=depth,
        weights=kinds,
        ple_file=_ple_file(config, quant),
        tokenizer=tokenizer,
        state=plan.bytes,
        touched=touched,
        phases=phases,
        checkpoints=CHECKPOINTS * plan.ring_bytes(depth),
    )


@dataclass(frozen=True)
class _Weights:
    """Bytes of weights as an engine holds them."""

    packed: dict[str, int]  # matrices of each program, as it packs them
    mapped: dict[str, int]  # what each program reads, as it was exported
    largest: int  # packed matrix; a part of the head counts as one
    kept: int  # left in the artifact's file where matrices are packed
    table: int  # the token table


def _onnx(
    config: ModelConfig, plan: KVPlan, depth: int, weights: _Weights, cache: bool
) -> dict[str, Phase]:
    """onnxruntime with native operators."""
    base = BASE_ANON + OPERATORS_GRAPH * (config.n_layers + config.n_own)
    work = _native_workspace(config, plan, depth, OPERATORS_ACTIVATIONS, OPERATORS_LOGITS)
    running = base + plan.touched_bytes(depth) + work
    lookup = min(weights.table, LOOKUP_BYTES * depth)
    return {
        "load": Phase(base, BASE_FILE),
        "prefill": Phase(running, BASE_FILE + lookup + weights.mapped["prefill"]),
        "decode": Phase(running, BASE_FILE + weights.mapped["decode"]),
    }


def _onnx_stock(
    config: ModelConfig, plan: KVPlan, depth: int, weights: _Weights, cache: bool
) -> dict[str, Phase]:
    """onnxruntime as it is installed."""
    packed = weights.packed
    base = BASE_ANON + GRAPH_BYTES * (config.n_layers + config.n_own)
    chunk = _workspace(config, plan, min(plan.chunk, depth), depth)
    step = _workspace(config, plan, 1, depth) + LOGITS * 4 * config.vocab_size
    file = BASE_FILE + weights.kept
    lookup = min(weights.table, LOOKUP_BYTES * depth)
    if cache:
        held, mapped = base, packed
        phases = {
            FIRST_LOAD: Phase(base + int(FIRST_PACKING * packed["decode"]), file),
            "load": Phase(base + int(PACKING * weights.largest), file),
        }
    else:
        held, mapped = base + sum(packed.values()), dict.fromkeys(_PROGRAMS, 0)
        phases = {"load": Phase(held, file)}
    touched = plan.touched_bytes(depth)
    phases["prefill"] = Phase(held + touched + chunk, file + lookup + mapped["prefill"])
    phases["decode"] = Phase(held + touched + chunk + step, file + lookup + mapped["decode"])
    return phases


def _executorch(
    config: ModelConfig, plan: KVPlan, depth: int, weights: _Weights, cache: bool
) -> dict[str, Phase]:
    base = NATIVE_ANON + NATIVE_GRAPH * (config.n_layers + config.n_own)
    work = _native_workspace(config, plan, depth, NATIVE_ACTIVATIONS, LOGITS)
    running = base + plan.touched_bytes(depth) + work
    lookup = min(weights.table, LOOKUP_BYTES * depth)
    return {
        "load": Phase(base, NATIVE_FILE),
        "prefill": Phase(running, NATIVE_FILE + lookup + weights.mapped["prefill"]),
        "decode": Phase(running, NATIVE_FILE + weights.mapped["decode"]),
    }


def _native_workspace(
    config: ModelConfig, plan: KVPlan, depth: int, activations: float, logits: float
) -> int:
    """Bytes that a chunk needs where attention is ours: its queries and sums, never scores."""
    rows = min(plan.chunk, depth)
    run = [p for p in plan.layers if not p.skip_in_prefill]
    widest = max(max(config.mlp(p.layer), p.q_heads * p.head_dim) for p in run)
    attention = max(
        rows * p.q_heads * p.head_dim + max(rows * p.q_heads, NATIVE_QUERY_BLOCK) * p.head_dim
        for p in run
    )
    floats = activations * rows * max(widest, config.hidden) + attention
    return int(4 * (floats + logits * config.vocab_size))


ENGINES = {"onnx": _onnx, "onnx-stock": _onnx_stock, "executorch": _executorch}
RUNNING = ("prefill", "decode")  # phases in which tokens have been fed


def streamed_bytes(config: ModelConfig, formats: Mapping[str, str]) -> int:
    """Bytes of weights that decoding one token reads: every matrix once, the head included.

    Of routed experts only the chosen ones count; the token table is read as the head, its one
    looked-up row is nothing beside it.
    """
    total = 0
    for spec in tensor_table(config):
        if spec.kind == PLE_TABLE:
            continue
        size, _ = _tensor_bytes(spec, formats)
        if spec.kind == EXPERT and config.moe:
            size = size * config.moe.top_k // config.moe.n_experts
        total += size
    return total


def _tensor_bytes(spec: TensorSpec, formats: Mapping[str, str]) -> tuple[int, int]:
    """Bytes of one tensor in the weight file, and of its packed form; values of a format with
    levels are packed as 8 bits."""
    fmt = stored_format(spec.kind, spec.shape, formats)
    if fmt is None:
        size = 4 * spec.elements
        return size, 0 if spec.kind == FLOAT else size
    bits = 8 if fmt.levels else fmt.bits
    blocks = spec.elements // BLOCK
    packed = spec.elements * bits // 8 + PACKED_SCALE_BYTES * blocks
    return prod(stored_shape(fmt, spec.shape)), packed


_PROGRAMS = ("prefill", "decode")


def _programs(config: ModelConfig, spec: TensorSpec) -> dict[str, float]:
    """Programs that read a tensor, and which part of it: prefill runs the owning layers only."""
    layer = spec.name.split(".")[1] if spec.name.startswith("layers.") else None
    if spec.kind == EMBED or (layer is not None and not config.owns(int(layer))):
        return {"decode": 1}
    rows = config.n_own / config.n_layers if spec.name == "ple_proj.weight" else 1
    return {"prefill": rows, "decode": 1}


def _ple_file(config: ModelConfig, quant: str) -> int:
    if not config.ple_dim:
        return 0
    values = config.n_layers * config.ple_dim
    bits = PLE_BITS[quant]
    coarse = bits < 32 and config.ple_dim % PLE_BLOCK == 0
    row = values * bits // 8 + 2 * values // PLE_BLOCK if coarse else 4 * values
    return config.vocab_size * row


def _workspace(config: ModelConfig, plan: KVPlan, rows: int, depth: int) -> int:
    """Bytes a program needs beside weights and state to run `rows` tokens at `depth`.

    The widest activations, the scores of a ring layer, and the largest full layer.
    """
    run = [p for p in plan.layers if rows == 1 or not p.skip_in_prefill]
    widest = max(max(config.mlp(p.layer), p.q_heads * p.head_dim) for p in run)
    rings = [p.q_heads * rows * plan.ring_slots for p in run if p.kind == RING]
    live = plan.live_rows(depth)
    full = [_full_attention(p, rows, live) for p in run if p.kind == APPEND]
    values = ACTIVATIONS * rows * max(widest, config.hidden)
    values += RING_SCORES * max(rings, default=0) + max(full, default=0)
    return 4 * (values + rows * config.n_layers * config.ple_dim)


def _full_attention(layer: LayerPlan, rows: int, live: int) -> int:
    """f32 values one full layer needs for `rows` queries over `live` rows.

    One token scores all rows as they are stored; a chunk goes block by block, each made float.
    """
    if rows == 1:
        return STEP_SCORES * layer.q_heads * live
    block = min(live, ATTEND_BLOCK)
    floats = FLOAT_ROWS * block * layer.kv_heads * layer.head_dim
    return floats + FULL_SCORES * layer.q_heads * rows * block
