"""E2B and E4B at full size and long context, beside llama.cpp, alternating on one machine.

Ours: `edge-kv bench` on exported artifacts. The peer: llama.cpp's own `llama-bench` on a GGUF of
the same shapes, with and without flash attention, each token table row read on demand. Both decode
and prefill at the same depths; rounds alternate between them, so that a machine that slows down
slows both. Prints a table and writes results/full_size.json.

    python benchmarks/full_size.py e2b-32768/ --llama-bench build/bin/llama-bench \\
        --gguf e2b-q4_0.gguf --depths 0,4096,16384,32256 --rounds 2

How to build the peer is in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from common import run_main, say, show, write_result

from edge_kv.artifact import Artifact, read_artifact
from edge_kv.errors import ConfigError, RuntimeFault
from edge_kv.runtime.bench import bench

FLASH = ("0", "1")


def main() -> None:
    args = _arguments()
    depths = [int(d) for d in args.depths.split(",")]
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        taken: dict[str, Any] = {"ours": [], "peer": []}
        for root in args.artifacts:
            say(f"round {number + 1}: {root}")
            taken["ours"].append(_ours(read_artifact(root), depths, args))
        if args.llama_bench:
            for flash in FLASH:
                say(f"round {number + 1}: llama-bench, flash attention {flash}")
                taken["peer"].append(_peer(args.llama_bench, args.gguf, depths, flash, args))
        rounds.append(taken)
    write_result(args.result, {"depths": depths, "rounds": rounds})
    show("Best of all rounds", _rows(rounds, depths))


def _ours(artifact: Artifact, depths: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """`bench` measures the prefill that ends at a context: it starts `prompt` tokens before."""
    contexts = [d + args.prompt for d in depths if d + args.prompt <= artifact.plan.ctx]
    return bench(
        artifact,
        contexts,
        engines=args.engine.split(","),
        threads=args.threads,
        prompt=args.prompt,
        tokens=args.tokens,
        repeats=args.repeats,
        fill=args.fill,
    )


def _peer(
    program: Path, gguf: Path, depths: list[int], flash: str, args: argparse.Namespace
) -> dict[str, Any]:
    """One llama-bench run: its own JSON, and the peak RAM of its process."""
    command = [
        str(program), "-m", str(gguf), "-t", str(args.threads), "-fa", flash, "-lzm", "on",
        "-p", str(args.prompt), "-n", str(args.tokens), "-d", ",".join(map(str, depths)),
        "-r", str(args.repeats), "-o", "json",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    peak: dict[str, int] = {}
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    out, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise RuntimeFault(f"{program} ended with status {process.returncode}; see its own output.")
    return {"command": command[1:], "tests": json.loads(out), "peak": peak}


def _watch(process: subprocess.Popen[bytes], peak: dict[str, int]) -> None:
    """Highest VmHWM and RssAnon of a process while it runs, in bytes."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            name, _, rest = line.partition(":")
            if name in ("VmHWM", "RssAnon"):
                peak[name] = max(peak.get(name, 0), 1024 * int(rest.split()[0]))
        time.sleep(0.05)


def _rows(rounds: list[dict[str, Any]], depths: list[int]) -> list[dict[str, Any]]:
    """A row for every subject and depth, the best speed of all rounds."""
    best: dict[tuple[str, int], dict[str, float]] = {}

    def note(run: str, depth: int, what: str, value: float) -> None:
        held = best.setdefault((run, depth), {})
        held[what] = max(held.get(what, 0.0), value)

    for taken in rounds:
        for document in taken["ours"]:
            for r in document["runs"]:
                name = f"{document['artifact']['name']} {r['engine']}"
                note(name, r["depth"], "prefill", r["prefill"]["rate"])
                note(name, r["depth"], "decode", 1 / r["decode"]["seconds"]["p50"])
                anon = [m["anon_peak"] or 0 for m in r["memory"].values()]
                note(name, r["depth"], "anon", max(anon))
        for peer in taken["peer"]:
            for test in peer["tests"]:
                name = f"llama.cpp fa={int(test['flash_attn'])}"
                kind = "prefill" if test["n_prompt"] else "decode"
                note(name, test["n_depth"], kind, test["avg_ts"])
                note(name, test["n_depth"], "anon", peer["peak"].get("RssAnon", 0))
    return [
        {
            "run": run,
            "depth": depth,
            "prefill_tok/s": round(held.get("prefill", 0.0), 1),
            "decode_tok/s": round(held.get("decode", 0.0), 2),
            "peak_anonymous_MB": round(held["anon"] / 1e6),
        }
        for (run, depth), held in sorted(best.items(), key=lambda item: (item[0][1], item[0][0]))
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--engine", default="onnx", help="onnx, executorch or both with a comma")
    parser.add_argument("--llama-bench", type=Path, help="the llama-bench program")
    parser.add_argument("--gguf", type=Path, help="the peer's model")
    parser.add_argument("--depths", default="0,4096,16384,32256")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fill", default="prefill", help="how a depth is reached: prefill, random")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--result", default="full_size", help="name in results/")
    args = parser.parse_args()
    if bool(args.llama_bench) != bool(args.gguf):
        raise ConfigError("--llama-bench and --gguf belong together; give both or neither.")
    return args


if __name__ == "__main__":
    run_main(main)
