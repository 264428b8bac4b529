"""What a large context costs an ExecuTorch session that does not use it, and what if it does.

    python benchmarks/executorch_contexts.py        results/executorch_contexts.json

One model with E2B's head sizes, window and sharing (six layers, reduced width, random weights, int4
weights, int8 KV) is exported for several contexts, with both lowerings of attention. A process of
its own loads each, decodes with DEPTH positions in use, then fills every row of the state and
decodes at the end of the context. Rows are random: neither time nor memory depends on their values.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import each_alone, run_main, say, show, write_result

from edge_kv import models
from edge_kv.cli.terminal import Bar
from edge_kv.export import export_model
from edge_kv.models.gemma import Config
from edge_kv.models.model import Row
from edge_kv.runtime import Session, load, read_memory

CONTEXTS = (4096, 32_768, 131_072)
RUNS = {"executorch": "native", "executorch-python": "portable"}  # engine -> attention
DEPTH, STEPS, ROUNDS = 2048, 16, 3


def shaped() -> Config:
    """E2B's state in a body of six layers, three of which share."""
    e2b = models.get_row("e2b").config
    assert isinstance(e2b, Config)
    return replace(
        e2b,
        layers=6,
        pattern="SSFSSF",
        shared=3,
        vocab=2048,
        hidden=512,
        mlp_width=1024,
        shared_mlp_width=2048,
    )


def main() -> None:
    args, alone = each_alone(__file__, measure, __doc__ or "")
    roots = {(e, ctx): export(a, ctx, args.work) for e, a in RUNS.items() for ctx in CONTEXTS}
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for _ in range(ROUNDS):  # contexts take turns, the fastest round of each counts
        for (engine, ctx), root in roots.items():
            row = alone(root, engine)
            say(f"{engine} {ctx}: {row}")
            kept = rows.setdefault((engine, ctx), row)
            for key in ("decode_ms", "decode_at_end_ms"):
                kept[key] = min(kept[key], row[key])
    listed = [{"engine": e, "attention": RUNS[e], **row} for (e, _), row in rows.items()]
    write_result(
        "executorch_contexts",
        {"what": "memory in bytes, milliseconds a token", "depth": DEPTH, "rows": listed},
    )
    show("contexts", listed)


def export(attention: str, ctx: int, work: Path) -> Path:
    """The artifact, made on first use; the preset exists in this process only."""
    root = work / f"e2b-state-{attention}-{ctx}"
    if root.exists():
        return root
    work.mkdir(parents=True, exist_ok=True)
    models.ROWS["e2b-state"] = Row(shaped(), "", "E2B's state, for a benchmark")
    say(f"exporting {root.name}")
    with Bar() as bar:
        return export_model(
            model="e2b-state",
            weights="random",
            ctx=ctx,
            backends=("executorch",),
            attention=attention,
            out=root,
            open_session=load,
            progress=bar,
        )


def measure(root: str, engine: str, threads: int) -> dict[str, Any]:
    """One artifact in this process: memory at each stage, milliseconds a token."""
    with load(root, engine, threads) as session:
        session.decode(1)
        loaded = read_memory()
        fill(session, 0, DEPTH)
        shallow = decode_ms(session, DEPTH)
        used = read_memory()
        fill(session, DEPTH, session.plan.ctx)
        deep = decode_ms(session, session.plan.ctx - STEPS)
        touched = read_memory()
        return {
            "ctx": session.plan.ctx,
            "state": session.plan.bytes,
            "anon_loaded": loaded.anon,
            "anon_at_depth": used.anon,
            "anon_full": touched.anon,
            "decode_ms": shallow,
            "decode_at_end_ms": deep,
        }


def fill(session: Session, begin: int, end: int) -> None:
    """Random rows at the positions begin … end-1 of every buffer that has them."""
    rng = np.random.default_rng(begin)
    for rows in session.state.values():
        part = rows[:, begin:end]
        values = rng.standard_normal(part.shape[1:], np.float32)
        part[:] = np.abs(values) / 64 if part.ndim == 2 else (values * 30).astype(rows.dtype)


def decode_ms(session: Session, pos: int) -> float:
    """Milliseconds of the fastest of STEPS tokens from `pos` on."""
    seconds = []
    for step in range(STEPS):
        begin = time.perf_counter()
        session._run_decode(step, pos + step)
        seconds.append(time.perf_counter() - begin)
    return round(min(seconds) * 1e3, 3)


if __name__ == "__main__":
    run_main(main)
