"""Two methods, prefill and decode, against one dynamic method: size, memory, speed, export time.

    python benchmarks/executorch_methods.py        results/executorch_methods.json

Both are lowered by the same code from the same modules and weights: `two` is what ships (prefill
runs the layers that own keys and values and has no logits), `one` is a single method of 1 … chunk
tokens through all layers with the logits of the last. The native engine runs both; for `one` its
prefill entry carries everything and its decode entry is a stub that is never called. The model has
E2B's proportions in ten layers, of which four own. Runs alternate, each in a process of its own.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import each_alone, run_main, say, show, write_result
from torch import Tensor, nn

from edge_kv import presets
from edge_kv.config import ModelConfig
from edge_kv.export import lower_executorch as lowering
from edge_kv.export.backends import BACKENDS
from edge_kv.export.executorch_state import StateBuffers
from edge_kv.export.weight_file import Journal, StoredWeights, write_weights
from edge_kv.kv_plan import plan_kv
from edge_kv.model.decoder import Decoder
from edge_kv.progress import Silent
from edge_kv.runtime import read_memory
from edge_kv.runtime.native_library import load_library
from edge_kv.weights import open_weights

CTX, CHUNK, PROMPT, STEPS, ROUNDS = 4096, 128, 1024, 32, 5
FORMS = ("two", "one")


class OneMethod(lowering.DecodeMethod):
    """ids [1 … chunk], pos [1], ple [tokens, n_layers, dim] -> logits [vocab] of the last."""


class Stub(nn.Module):
    """Takes what decode takes, and the state with it; returns logits that are all zero."""

    def __init__(
        self, decoder: Decoder, state: StateBuffers, attention: lowering.AttentionLowering
    ):
        super().__init__()
        self.vocab = decoder.config.vocab_size

    def forward(self, ids: Tensor, pos: Tensor, ple: Tensor | None = None) -> Tensor:
        return torch.zeros(self.vocab) + pos


def shaped() -> ModelConfig:
    """E2B at half width, with ten layers, five of which own; a small vocabulary."""
    e2b = presets.get_preset("e2b").config
    return replace(
        e2b,
        pattern="SSSSF" * 2,
        n_kv_shared=5,
        vocab_size=8192,
        hidden=e2b.hidden // 2,
        mlp_width=e2b.mlp_width // 2,
        shared_mlp_width=e2b.shared_mlp_width // 2,
        sliding=replace(e2b.sliding, q_heads=4),
        full=replace(e2b.full, q_heads=4),
    )


def main() -> None:
    args, alone = each_alone(__file__, measure, __doc__ or "")
    rows = lower_both(args.work / "executorch-methods")
    taken: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    for _ in range(ROUNDS):
        for form in FORMS:
            taken[form].append(alone(rows[form]["path"], form))
            say(f"{form}: {taken[form][-1]}")
    for form, row in rows.items():
        row["bytes"] = Path(row.pop("path")).stat().st_size
        for key in taken[form][0]:
            row[key] = float(f"{median(t[key] for t in taken[form]):.4g}")
    result = {"model": "E2B's proportions, 10 layers (5 own), hidden 768", "chunk": CHUNK}
    write_result(
        "executorch_methods",
        {**result, "prompt": PROMPT, "threads": args.threads, "rows": rows},
    )
    show("methods", [{"run": form, **row} for form, row in rows.items()])


def lower_both(folder: Path) -> dict[str, dict[str, Any]]:
    """Lower the model in both forms; size, delegates and seconds of each."""
    folder.mkdir(parents=True, exist_ok=True)
    config = shaped()
    plan = plan_kv(config, ctx=CTX, chunk=CHUNK)
    layout = BACKENDS["executorch"].layout(config, "int4", 32)
    weights = StoredWeights(layout, folder / "weights.bin")
    source = open_weights("random", config)
    write_weights(source, layout, weights.path, Journal(folder / "journal.jsonl"), Silent())
    shipped = lowering._trace
    rows = {}
    for form, trace in zip(FORMS, (shipped, trace_one), strict=True):
        path = folder / f"{form}.pte"
        say(f"lowering {path.name}")
        begin = time.perf_counter()
        lowering._trace = trace
        try:
            details = lowering.lower_executorch(
                config, plan, weights, path, facts={}, attention="native", delegate=True
            )
        finally:
            lowering._trace = shipped
        seconds = round(time.perf_counter() - begin, 1)
        delegates = sum(details["delegates"].values())
        rows[form] = {"path": str(path), "delegates": delegates, "lower_seconds": seconds}
    return rows


def trace_one(decoder: Any, plan: Any, config: ModelConfig, attention: Any) -> dict[str, Any]:
    """What `lower_executorch` traces, for the single dynamic method."""
    state = StateBuffers(plan)
    chunk = torch.export.Dim("chunk", min=1, max=plan.chunk)
    exported = {}
    for name, method, tokens in (("prefill", OneMethod, 3), ("decode", Stub, 1)):
        ids, pos = torch.zeros(tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        grows = {0: chunk} if tokens > 1 else None
        exported[name] = torch.export.export(
            method(decoder, state, attention).eval(),
            (ids, pos, torch.zeros(tokens, config.n_layers, config.ple_dim)),
            dynamic_shapes={"ids": grows, "pos": None, "ple": grows},
            strict=False,
        )
    return exported


def measure(path: str, form: str, threads: int) -> dict[str, float]:
    """Load, prefill PROMPT tokens, decode STEPS: seconds, rates and anonymous memory."""
    config, native = shaped(), load_library()
    before = read_memory().anon or 0
    error = ctypes.create_string_buffer(512)
    begin = time.perf_counter()
    handle = native.edge_kv_open(path.encode(), b"", threads, error, len(error))
    loaded = time.perf_counter() - begin
    if not handle:
        raise SystemExit(error.value.decode())
    own = config.n_layers if form == "one" else config.n_own
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, PROMPT)
    ple = rng.standard_normal((CHUNK, config.n_layers, config.ple_dim), np.float32)
    some = np.ascontiguousarray(ple[:, :own])
    logits = np.empty(config.vocab_size, np.float32)

    def chunk(at: int, count: int) -> None:
        part = np.ascontiguousarray(ids[at % PROMPT :][:count])
        given = (handle, part.ctypes.data, count, at, some.ctypes.data)
        if native.edge_kv_prefill(*given, error, len(error)):
            raise SystemExit(error.value.decode())

    def decode(at: int) -> None:
        given = (handle, 7, at, ple.ctypes.data, logits.ctypes.data, len(logits))
        if native.edge_kv_decode(*given, error, len(error)):
            raise SystemExit(error.value.decode())

    def step(at: int) -> None:
        if form == "one":
            chunk(at, 1)
        else:
            decode(at)

    chunk(0, CHUNK)
    step(CHUNK)
    begin = time.perf_counter()
    for at in range(0, PROMPT, CHUNK):
        chunk(at, CHUNK)
    prefilled = time.perf_counter() - begin
    begin = time.perf_counter()
    for at in range(PROMPT, PROMPT + STEPS):
        step(at)
    decoded = time.perf_counter() - begin
    return {
        "load_seconds": loaded,
        "prefill_rate": PROMPT / prefilled,
        "decode_rate": STEPS / decoded,
        "anon": (read_memory().anon or 0) - before,
    }


if __name__ == "__main__":
    run_main(main)
