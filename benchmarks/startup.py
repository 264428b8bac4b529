"""How long a start takes: from the command to the first token, with a cold and a warm page cache.

    python benchmarks/startup.py e2b e2b-et --engine onnx,executorch        results/startup.json

Every start is a process of its own that loads the artifact, with weights packed for this device by
an earlier start, and decodes one token; a clock of the parent's started it. Before a cold start the
page cache forgets the artifact and the packed weights. Engines take turns.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from common import run_main, say, show, write_result
from memory_limits import forget, measured

from edge_kv.artifact import read_artifact
from edge_kv.runtime import ENGINES
from edge_kv.runtime.bench import Job
from edge_kv.runtime.cache import cache_directory
from edge_kv.runtime.threads import thread_count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--engine", default="onnx", help="engines, with commas")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--starts", type=int, default=5, help="of each kind")
    args = parser.parse_args()
    threads = thread_count(args.threads)
    subjects = {
        f"{artifact.manifest.name} {engine}": Job(
            "measure", str(root), engine, threads, cache=True, depths=(0,), prompt=1, tokens=1,
            repeats=1, fill="random",
        )
        for root in args.artifacts
        for artifact in [read_artifact(root)]
        for engine in args.engine.split(",")
        if ENGINES[engine][2] in artifact.manifest.backends
    }  # fmt: skip
    for job in subjects.values():
        measured(job, None)  # packs where that has not been done
    starts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for kind in ("cold", "warm"):
        for _ in range(args.starts):
            for name, job in subjects.items():
                if kind == "cold":
                    forget(Path(job.artifact), cache_directory())
                run = measured(job, None)
                starts.setdefault((name, kind), []).append(run)
                say(f"{name}, {kind}: {run['first_token']:.2f} s, load {run['load']:.2f} s")
    rows = [
        {
            "run": name,
            "page_cache": kind,
            "first_token_s": [round(run["first_token"], 3) for run in runs],
            "load_s": [round(run["load"], 3) for run in runs],
        }
        for (name, kind), runs in starts.items()
    ]
    write_result("startup", {"threads": threads, "rows": rows})
    show(
        "Seconds, medians",
        [
            {k: round(median(v), 2) if isinstance(v, list) else v for k, v in row.items()}
            for row in rows
        ],
    )


if __name__ == "__main__":
    run_main(main)
