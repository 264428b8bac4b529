"""What a change cost: one model from this checkout beside one from an earlier commit.

    git worktree add --detach ../earlier 3d49bb5
    python benchmarks/against_commit.py e2b --earlier ../earlier e2b-earlier --ctx 1024,32768

Each side runs `bench` of its own checkout over an artifact that its own `export` made, engine by
engine, one after the other in every round, so that both meet the same state of the machine.
Contexts are filled with random rows. Medians of all rounds, and the ratio of the two sides'
medians, go to results/against_commit.json, with the bytes of both artifacts' files.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from common import numbers, run_main, say, show, write_result

from edge_kv.errors import RuntimeFault

ROOT = Path(__file__).parent.parent
TODAY, EARLIER = "today", "earlier"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact", type=Path, help="of this checkout")
    parser.add_argument("--earlier", type=Path, nargs=2, required=True,
                        metavar=("CHECKOUT", "ARTIFACT"))  # fmt: skip
    parser.add_argument("--engines", default="onnx,executorch")
    parser.add_argument("--ctx", type=numbers, default=[1024, 32768])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    checkout, artifact = args.earlier
    sides = {TODAY: (ROOT, args.artifact), EARLIER: (checkout, artifact)}
    runs: list[dict[str, Any]] = []
    for ctx in args.ctx:
        for number in range(args.rounds):
            for engine in args.engines.split(","):
                for side, (code, root) in sides.items():
                    measured = bench(code, root, engine, ctx, args.tokens)
                    runs.append({"side": side, "engine": engine, "ctx": ctx, "round": number}
                                | measured)  # fmt: skip
                    say(f"{side} {engine} {ctx:,}: {measured['decode']:.1f} tok/s")
    summary = [compared(runs, e, c) for c in args.ctx for e in args.engines.split(",")]
    show("today beside the earlier commit", summary)
    write_result("against_commit", {
        "earlier": head(checkout), "today": head(ROOT), "rounds": args.rounds,
        "sizes": {side: sizes(root) for side, (_, root) in sides.items()},
        "summary": summary, "runs": runs,
    })  # fmt: skip


def bench(code: Path, artifact: Path, engine: str, ctx: int, tokens: int) -> dict[str, Any]:
    """One measurement by the checkout `code`, with `ctx` tokens of context in use at its end.

    Returns tokens a second of decode and prefill, and bytes of anonymous and total peak memory.

    Raises:
        RuntimeFault: `bench` of that checkout failed.
    """
    words = ["bench", str(artifact), "--ctx", str(ctx), "--engine", engine, "--json", "-",
             "--tokens", str(tokens), "--repeats", "1", "--fill", "random"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "edge_kv", *words],
        env={**os.environ, "PYTHONPATH": str(code.resolve())},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeFault(f"bench of {code} failed: {done.stderr.strip()[-300:]}")
    (run,) = json.loads(done.stdout)["runs"]
    memory = run["memory"]["decode"]
    return {
        "decode": run["decode"]["rate"],
        "prefill": run["prefill"]["rate"],
        "anon_peak": memory["anon_peak"],
        "rss_peak": memory["rss_peak"],
    }


def compared(runs: list[dict[str, Any]], engine: str, ctx: int) -> dict[str, Any]:
    """Medians of both sides at one engine and context, and today's over the earlier."""
    row: dict[str, Any] = {"engine": engine, "ctx": ctx}
    for figure in ("decode", "prefill", "anon_peak", "rss_peak"):
        found = {
            side: median(r[figure] for r in runs if (r["side"], r["engine"], r["ctx"])
                         == (side, engine, ctx))
            for side in (TODAY, EARLIER)
        }  # fmt: skip
        row |= {f"{figure} {side}": value for side, value in found.items()}
        row[f"{figure} ratio"] = found[TODAY] / found[EARLIER]
    return row


def sizes(artifact: Path) -> dict[str, int]:
    """Bytes of an artifact, and of the files of its weights and programs."""
    files = {str(p.relative_to(artifact)): p.stat().st_size for p in artifact.rglob("*.*")}
    return {"total": sum(files.values())} | files


def head(checkout: Path) -> str:
    """The commit a checkout is at."""
    words = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    run_main(main)
