"""E2B and E4B at full size and long context, engine beside engine and beside llama.cpp.

One measurement is a process of its own: it restores the state at a depth, prefills a prompt onto
it and decodes from it. Ours are those of `edge-kv bench`; the peer's is `llama_peer.c`, with and
without flash attention. At every depth all of them take turns, round after round, so that a
machine that slows down slows all. Writes results/full_size_NAME.json, one row a measurement.

    python benchmarks/full_size.py e2b/ --engine onnx,executorch --depths 0,4096,16384,32256 \\
        --peer ./llama_peer --gguf e2b-q4_0.gguf --snapshots DIR --rounds 3

How to build the peer is in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from common import run_main, say, show, watched, write_result

from edge_kv.artifact import Artifact, read_artifact
from edge_kv.errors import ConfigError, RuntimeFault
from edge_kv.runtime import ENGINES
from edge_kv.runtime.bench import bench

PEER = "llama.cpp"


def main() -> None:
    args = _arguments()
    depths = [int(d) for d in args.depths.split(",")]
    artifacts = [read_artifact(root) for root in args.artifacts]
    subjects: dict[str, Callable[[int], dict[str, Any]]] = {}
    for artifact in artifacts:
        for engine in args.engine.split(","):
            if ENGINES[engine][2] in artifact.manifest.backends:
                name = f"{artifact.manifest.name} {engine}"
                subjects[name] = lambda d, a=artifact, e=engine: ours(a, e, d, args)
    if args.peer:
        for flash in args.flash.split(","):
            subjects[f"{PEER} fa={flash}"] = lambda d, f=flash: peer(d, f, args)
    rows = []
    for depth in depths:
        for number in range(args.rounds):
            for name, measure in subjects.items():
                if name.startswith(PEER) and depth > args.peer_depth:
                    continue
                row = {"subject": name, "depth": depth, "round": number, **measure(depth)}
                rows.append(row)
                say(f"{name} at {depth:,}: {row['decode']:.2f} / {row['prefill']:.1f} tokens/s")
    summary = summarise(rows)
    conditions = {
        "threads": args.threads, "prompt": args.prompt, "tokens": args.tokens,
        "repeats": args.repeats, "fill": args.fill,
    }  # fmt: skip
    said = {"note": args.note + " "} if args.note else {}
    measured = {"conditions": conditions, "summary": summary, "rows": rows}
    write_result(args.result, {**said, **measured})
    show("Medians of all rounds; ratios to the best of llama.cpp", _table(summary))


def ours(artifact: Artifact, engine: str, depth: int, args: argparse.Namespace) -> dict[str, Any]:
    """`bench` measures the prefill that ends at a context: it starts `prompt` tokens before."""
    document = bench(
        artifact, [min(depth + args.prompt, artifact.plan.ctx)], engines=[engine],
        threads=args.threads, prompt=args.prompt, tokens=args.tokens, repeats=args.repeats,
        fill=args.fill,
    )  # fmt: skip
    (run,) = document["runs"]
    memory = run["memory"].values()
    planned = [m["anon_planned"] for m in memory if "anon_planned" in m]
    return {
        "decode": 1 / run["decode"]["seconds"]["p50"],
        "decode_seconds": run["decode"]["seconds"],
        "prefill": run["prefill"]["rate"],
        "first_token_after_start": run["load"]["start_to_first_token"],
        "load": run["load"]["seconds"],
        "anon_peak": max(m["anon_peak"] for m in memory),
        "anon_planned": max(planned) if planned else None,
        "rss_peak": max(m["rss_peak_so_far"] for m in memory),
        "filled": run["filled"],
        "of_roofline": run["roofline"]["fraction"],
        "bandwidth": document["bandwidth"]["best"],
    }


def peer(depth: int, flash: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run of llama_peer, its row and the peaks of its process."""
    ctx = -(-(depth + args.prompt) // 256) * 256
    command = [
        str(args.peer.resolve()), f"model={args.gguf}", f"ctx={ctx}", f"fa={flash}", "kv=f16",
        "nout=16", f"threads={args.threads}", f"depths={depth}", f"pp={args.prompt}",
        f"tg={args.tokens}", f"reps={args.repeats}", f"snapshots={args.snapshots}",
    ]  # fmt: skip
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    out, _, peak = watched(process)
    if process.returncode:
        raise RuntimeFault(f"{args.peer} ended with status {process.returncode}; run it by hand.")
    lines = [json.loads(line) for line in out.splitlines()]
    result = lines[-1]
    return {
        "decode": 1e3 / result["decode_p50_ms"],
        "prefill": result["prefill_tok_s"],
        "load": lines[0]["load_to_first_token_s"],
        "anon_peak": peak.get("RssAnon", 0),
        "rss_peak": peak.get("VmHWM", 0),
        "filled": "prefilled in this run" if len(lines) > 2 else "restored",
        "seconds": time.perf_counter() - begin,
    }


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians by subject and depth, with the ratio to the peer's better setting there."""
    medians = []
    for subject, depth in dict.fromkeys((r["subject"], r["depth"]) for r in rows):
        mine = [r for r in rows if (r["subject"], r["depth"]) == (subject, depth)]
        keys = ("decode", "prefill", "load", "anon_peak", "rss_peak")
        medians.append(
            {"subject": subject, "depth": depth}
            | {key: median(r[key] for r in mine) for key in keys}
            | {"rounds": len(mine)}
        )
    for row in medians:
        peers = [r for r in medians if r["subject"].startswith(PEER) and r["depth"] == row["depth"]]
        for key in ("decode", "prefill") if peers else ():
            row[f"{key}_ratio"] = row[key] / max(p[key] for p in peers)
    return medians


def _table(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "run": r["subject"],
            "depth": r["depth"],
            "decode_tok/s": f"{r['decode']:.2f}",
            "ratio": f"{r['decode_ratio']:.2f}" if "decode_ratio" in r else "",
            "prefill_tok/s": f"{r['prefill']:.1f}",
            "prefill_ratio": f"{r['prefill_ratio']:.2f}" if "prefill_ratio" in r else "",
            "anonymous_MB": round(r["anon_peak"] / 1e6),
            "peak_RSS_MB": round(r["rss_peak"] / 1e6),
        }
        for r in summary
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--engine", default="onnx", help="engines of ours, with commas")
    parser.add_argument("--peer", type=Path, help="the program built from llama_peer.c")
    parser.add_argument("--gguf", type=Path, help="the peer's model")
    parser.add_argument("--snapshots", type=Path, help="where the peer keeps its state at a depth")
    parser.add_argument(
        "--peer-depth", type=int, default=32_768, help="the deepest the peer is measured"
    )
    parser.add_argument("--flash", default="0,1", help="the peer's flash attention: 0, 1 or both")
    parser.add_argument("--depths", default="0,4096,16384,32256")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--fill", default="prefill", help="how a depth is reached: prefill, random")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="a sentence on what is compared")
    parser.add_argument("--result", default="full_size", help="name in results/")
    args = parser.parse_args()
    given = [bool(args.peer), bool(args.gguf), bool(args.snapshots)]
    if any(given) != all(given):
        raise ConfigError("--peer, --gguf and --snapshots belong together; give all or none.")
    return args


if __name__ == "__main__":
    run_main(main)
