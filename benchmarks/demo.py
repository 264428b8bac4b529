"""What `make demo` shows: text streamed by every engine of an artifact, then what each one cost.

    python benchmarks/demo.py artifacts/tiny --engines onnx

Every run is a process of its own, so that a peak belongs to one engine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edge_kv.amounts import size
from edge_kv.memory import UNPLANNED

PROMPT = "And it came to pass in those days, that"
PASSAGE = Path(__file__).parent.parent / "edge_kv" / "data" / "passage.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact")
    parser.add_argument("--engines", nargs="+", default=["onnx"])
    parser.add_argument("--tokens", type=int, default=100, help="to decode in each run")
    args = parser.parse_args()
    limit = ["--max-new-tokens", str(args.tokens)]
    sampling = ["--temperature", "0.7", "--top-p", "0.9", "--seed", "7"]
    rows = []
    for engine in args.engines:
        print(f"\n--- {engine} ---\n{PROMPT} …", flush=True)
        run(args.artifact, PROMPT, "--engine", engine, *limit, *sampling, capture=False)
        said = run(args.artifact, "--file", str(PASSAGE), "--engine", engine, *limit, "--json")
        rows.append((engine, json.loads(said)))
    print()
    Console().print(table(rows))
    if not all(cost["planned_peak_bytes"] for _, cost in rows):
        Console().print(UNPLANNED)


def run(*args: str, capture: bool = True) -> str:
    """`edge-kv run` in a process of its own; its stdout when captured."""
    command = [sys.executable, "-m", "edge_kv", "run", *args]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def table(rows: list[tuple[str, dict[str, Any]]]) -> Table:
    """One column an engine: latency of each phase, peak RAM beside the plan's prediction."""
    prompt = rows[0][1]["prompt_tokens"]
    made = Table(f"after a prompt of {prompt:,} tokens", box=None, pad_edge=False)
    lines: dict[str, list[str]] = {}
    for engine, cost in rows:
        made.add_column(engine, justify="right")
        for name, value in {
            "load": f"{cost['load_seconds']:.2f} s",
            "time to first token": f"{cost['first_token_seconds']:.2f} s",
            "prefill": f"{cost['prefill_rate']:,.0f} tokens/s",
            "decode": f"{cost['decode_rate']:,.0f} tokens/s",
            "decode latency, median": f"{1e3 * cost['latency_p50']:.2f} ms",
            "decode latency, 95 of 100": f"{1e3 * cost['latency_p95']:.2f} ms",
            "KV state": size(cost["kv_bytes"]),
            "peak RAM": size(cost["peak_bytes"]) if cost["peak_bytes"] else "unknown",
            "peak RAM as planned": size(cost["planned_peak_bytes"])
            if cost["planned_peak_bytes"]
            else "–",
        }.items():
            lines.setdefault(name, [name]).append(value)
    for line in lines.values():
        made.add_row(*line)
    return made


if __name__ == "__main__":
    main()
