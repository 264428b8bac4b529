"""Other runtimes a user might pick, beside this project on the same prompt.

Each measurement is a process of its own (`peer_worker.py`): load, another prompt to warm up, the
prompt, greedy decode. All take turns, round after round. A peer that fails or takes too long gets
a row with the reason, and the rest goes on. Writes results/NAME.json, one row a measurement.

    python benchmarks/peers.py gemma3-270m ARTIFACT --peers DIR --result peers_gemma3_270m
    python benchmarks/peers.py e2b ARTIFACT --peers DIR --result peers_e2b

How to make DIR, with each peer's environment and model, is in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from common import read_text, run_main, say, show, watched, write_result

from edge_kv.artifact import read_artifact
from edge_kv.runtime import ENGINES, Tokenizer

WORKER = Path(__file__).with_name("peer_worker.py")
OURS = "edge-kv"


@dataclass(frozen=True)
class Subject:
    """One row of the comparison; `python` and `model` are paths inside --peers."""

    name: str
    weights: str
    runtime: str  # in peer_worker.RUNTIMES
    model: str
    python: str = sys.executable
    options: dict[str, Any] = field(default_factory=dict)


PEERS = {
    "gemma3-270m": (
        Subject(
            "transformers f32, eager attention", "f32", "transformers", "gemma3-270m-hf",
            options={"dtype": "float32", "attention": "eager"},
        ),
        Subject(
            "transformers bf16, sdpa attention", "bf16", "transformers", "gemma3-270m-hf",
            options={"dtype": "bfloat16", "attention": "sdpa"},
        ),
        Subject(
            "onnxruntime-genai", "int4 block 32", "onnxruntime-genai",
            "gemma3-270m-onnxruntime-genai", "onnxruntime-genai/bin/python",
        ),
        Subject(
            "OpenVINO GenAI", "int4 block 32", "openvino-genai", "gemma3-270m-openvino",
            "openvino/bin/python",
        ),
        Subject(
            "LiteRT-LM", "int8", "litert-lm", "gemma3-270m-litert/model.litertlm",
            "litert/bin/python",
        ),
    ),
    "e2b": (
        Subject(
            "transformers bf16, sdpa attention", "bf16", "transformers", "e2b-hf",
            options={"dtype": "bfloat16", "attention": "sdpa"},
        ),
    ),
}  # fmt: skip


def main() -> None:
    args = _arguments()
    subjects = [s for root in args.artifacts for s in _ours(root)] + [*PEERS[args.model]]
    n = args.prompt
    text = read_text(args.model, Tokenizer.of(read_artifact(args.artifacts[0])), 2 * n)
    job = {
        "prompt": text.ids[:n],
        "warm": [text.ids[0], *text.ids[n : 2 * n - 1]],
        "threads": args.threads,
        "tokens": args.tokens,
    }
    conditions = {"prompt": n, "threads": args.threads, "tokens": args.tokens}
    rows: list[dict[str, Any]] = []
    for number in range(args.rounds):
        for s in subjects:
            rows.append({"subject": s.name, "round": number, **measure(s, job, args)})
            say(f"{s.name}: {rows[-1].get('failed') or _rates(rows[-1])}")
            summary = summarise(subjects, rows)
            measured = {"conditions": conditions, "summary": summary, "rows": rows}
            write_result(args.result, {"model": args.model, **text.card(), **measured})
    show("Medians of all rounds; ratios to the best peer", map(_line, summary))


def _ours(root: Path) -> list[Subject]:
    """An artifact on each engine it has programs for."""
    manifest = read_artifact(root).manifest
    weights = f"{manifest.quant.scheme} ({manifest.quant.formats.get('linear', 'float')})"
    return [
        Subject(f"{OURS} {engine}", weights, OURS, str(root), options={"engine": engine})
        for engine in ("onnx", "executorch")
        if ENGINES[engine][2] in manifest.backends
    ]


def measure(s: Subject, job: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Rates in tokens/s, load in s, peaks in bytes of one worker process; or why there are none."""
    given = job | {"runtime": s.runtime, "model": str(args.peers / s.model), "options": s.options}
    try:
        process = subprocess.Popen(
            [args.peers / s.python, WORKER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
        )  # fmt: skip
    except OSError as e:
        return {"failed": f"its environment does not start: {e.strerror}"}
    try:
        out, err, peak = watched(process, json.dumps(given).encode(), args.timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result in {args.timeout} s"}
    if process.returncode:
        last = (err.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        return {"failed": f"status {process.returncode}: " + re.sub(r"/\S*/", "", last)[:200]}
    result = json.loads(out.splitlines()[-1])
    return {
        "decode": 1 / median(result["others"]),
        "prefill": args.prompt / result["first"],
        "load": result["load"],
        "anon_peak": peak.get("RssAnon", 0),
        "rss_peak": peak.get("VmHWM", 0),
        "version": result["version"],
        "token_seconds": result["others"],
    }


def summarise(subjects: list[Subject], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians by subject, with the ratio of each rate to the best peer's; or why there are none."""
    summary = []
    for s in subjects:
        mine = [r for r in rows if r["subject"] == s.name]
        good = [r for r in mine if "failed" not in r]
        row: dict[str, Any] = {"subject": s.name, "weights": s.weights, "rounds": len(good)}
        if good:
            keys = ("decode", "prefill", "load", "anon_peak", "rss_peak")
            row |= {key: median(r[key] for r in good) for key in keys}
            row["version"] = good[0]["version"]
        elif mine:
            row["failed"] = mine[-1]["failed"]
        summary.append(row)
    for key in ("decode", "prefill"):
        best = max((r.get(key, 0) for r in summary if not r["subject"].startswith(OURS)), default=0)
        for row in summary:
            if best and key in row:
                row[f"{key}_ratio"] = row[key] / best
    return summary


def _rates(row: dict[str, Any]) -> str:
    return f"prefill {row['prefill']:.1f}, decode {row['decode']:.2f} tokens/s"


def _line(row: dict[str, Any]) -> dict[str, Any]:
    if "failed" in row:
        return {"run": row["subject"], "result": row["failed"]}
    ratios = f"{row.get('prefill_ratio', 0):.2f} / {row.get('decode_ratio', 0):.2f}"
    return {"run": row["subject"], "result": f"{_rates(row)}; {ratios}"}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=PEERS, help="whose peers")
    parser.add_argument("artifacts", nargs="+", type=Path, help="ours; the first has a tokenizer")
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="environments and models")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one measurement")
    parser.add_argument("--result", default="peers", help="name in results/")
    args = parser.parse_args()
    args.peers = args.peers.absolute()
    args.artifacts = [root.absolute() for root in args.artifacts]
    return args


if __name__ == "__main__":
    run_main(main)
