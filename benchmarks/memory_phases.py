"""Memory of one process, phase by phase, beside the plan: one line of JSON. No torch is imported.

python benchmarks/memory_phases.py ARTIFACT ENGINE DEPTH STEPS THREADS
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge_kv.artifact import read_artifact
from edge_kv.memory import TOKEN_BYTES, count_merges, needs_of, predict_artifact
from edge_kv.runtime import load
from edge_kv.runtime.base import own_base
from edge_kv.runtime.bench import Watch, prompt_ids


def measure(root: Path, engine: str, depth: int, steps: int, threads: int) -> dict[str, Any]:
    """Peaks of every phase in this process, what it held before, and the plan of both."""
    artifact = read_artifact(root)
    for name in artifact.manifest.files:
        forget(root / name)
    base = own_base(engine)
    memory: dict[str, dict[str, int | None]] = {}
    with Watch(memory, "load"):
        session = load(artifact, engine, threads)
    if artifact.manifest.tokenizer:
        from edge_kv.runtime import Tokenizer

        with Watch(memory, "tokenizer"):
            tokenizer = Tokenizer.of(artifact)
            assert tokenizer.vocab_size
    depth = min(depth, artifact.plan.ctx)
    ids = prompt_ids(artifact.tokens.vocab, depth)
    with Watch(memory, "prefill"):
        session.prefill(ids[: depth - steps])
    with Watch(memory, "decode"):
        for token in ids[depth - steps :]:
            session.decode(int(token))
        for drafts in passes(session.drafts):
            session.rewind(drafts + 1)
            session.decode_many(ids[depth - drafts - 1 : depth])
    planned = predict_artifact(artifact, depth, engine=engine, base=base)
    needs, tokens = needs_of(artifact), artifact.manifest.tokenizer
    merges = count_merges(root / tokens.file) if tokens else 0
    return {
        "depth": depth,
        "base": asdict(base),
        "measured": {
            n: {"anon": m["anon_peak"], "held": m["anon"], "file": m["file"],
                "total": m["rss_peak"]}
            for n, m in memory.items()
        },
        "planned": {
            n: {"anon": p.anon, "file": p.file, "total": p.total}
            for n, p in planned.phases.items()
        },
        "sizes": {
            "layers": artifact.layers, "row": needs.row, "vocab": artifact.tokens.vocab,
            "merges": merges or 0, "chunk": artifact.plan.chunk, "dense": needs.dense,
            "state": artifact.plan.touched(depth) + TOKEN_BYTES * depth,
        },
    }  # fmt: skip


def passes(most: int) -> list[int]:
    """Drafts of the passes that are made: one, about half of the most, and the most, as drafts of
    several lengths follow each other in a reply."""
    return sorted({1, most // 2, most} - {0}) if most else []


def forget(path: Path) -> None:
    """Drop a file from the page cache. Pages of one that was just written lie there in pieces of up
    to 2 MB, which are mapped as a whole; read from storage, as on a device, they do not."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


if __name__ == "__main__":
    root, engine, *numbers = sys.argv[1:]
    print(json.dumps(measure(Path(root), engine, *map(int, numbers))))
