"""Planned against measured memory: every phase, model and engine, each in a process of its own.

    python benchmarks/memory_model.py --work artifacts [--engines onnx,executorch]
    python benchmarks/memory_model.py --work artifacts --fit     # the costs that fit best
    python benchmarks/memory_model.py --work artifacts --python "chroot /trixie /venv/bin/python" \
        --result memory_model_python313                          # what another Python measures
    python benchmarks/memory_model.py --work artifacts --python fresh/bin/python \
        --result memory_fresh_install         # right after pip wrote fresh/, before a restart

A process imports the engine, notes what it holds, opens the artifact, reads the tokenizer if there
is one, feeds a prompt and decodes; each phase's peaks stand beside the plan. Costs of an engine
(`edge_kv.memory.COSTS`) are fitted to the models of FITTED; the others only check them. Models
without a checkpoint here get random weights, and keep as many of their layers as their name says.
Models with a tokenizer also run under the least `--ram-limit` that lets them start. Another Python
(`--python`) needs this package installed, and the artifacts and this folder under the same paths.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import gguf_path, run_main, say, show, smollm2_path, write_result

from edge_kv import models
from edge_kv.amounts import size
from edge_kv.models.model import Row

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from ram_runs import least_limit, peak_under

CTX = 2048
PROBE = Path(__file__).with_name("memory_phases.py")
DEPTH, STEPS = 1024, 16
WITHIN, OR_BYTES = 0.05, 5e6  # of the measured peak, or bytes


def cut(name: str, layers: int, **fields: Any) -> Row:
    """An official model at its full width with the first `layers` of its layers."""
    row = models.get_row(name)
    config: Any = row.config
    if hasattr(config, "pattern"):
        fields["pattern"] = config.pattern[:layers]
    return Row(replace(config, layers=layers, **fields), "", f"{layers} layers of {name}")


FITTED = {
    "gemma3-1b, 8 layers": cut("gemma3-1b", 8),
    "qwen3-0.6b, 8 layers": cut("qwen3-0.6b", 8),
    "e2b": models.get_row("e2b"),
    "e2b, 10 layers": cut("e2b", 10, shared=5, vocab=65_536),
}
CHECKED = {
    "tiny": models.get_row("tiny"),
    "smollm2-135m": models.get_row("smollm2-135m"),
    "gemma3-270m": models.get_row("gemma3-270m"),
    "llama3.2-1b": models.get_row("llama3.2-1b"),
}


def weights_of(model: str) -> str:
    """The checkpoint of `model` that there is here; random weights of those there is none of."""
    if model == "tiny":
        return str(CHECKED[model].weights)
    if model == "gemma3-270m":
        return str(gguf_path())
    if model == "smollm2-135m":
        return str(smollm2_path())
    return "random"


def exported(model: str, work: Path) -> Path:
    """The artifact of `model` for both engines, exported if it is not in `work` yet."""
    root = work / model.replace(", ", "-").replace(" ", "-")
    if not root.exists():
        from edge_kv.export import export_model
        from edge_kv.runtime import load

        say(f"exporting {root.name}")
        root.parent.mkdir(parents=True, exist_ok=True)
        weights = weights_of(model)
        if weights == "random":
            models.ROWS[model] = FITTED.get(model) or CHECKED[model]
        export_model(
            model=model if weights == "random" else None, weights=weights, ctx=CTX, quant="int4",
            backends=("onnx", "executorch"), calibration="none", out=root, open_session=load,
        )  # fmt: skip
    return root


def alone(python: list[str], root: Path, engine: str, threads: int) -> dict[str, Any]:
    """One run of memory_phases.py."""
    command = [*python, str(PROBE), str(root), engine, str(DEPTH), str(STEPS), str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def under_limit(root: Path, engine: str, python: tuple[str, ...]) -> dict[str, int]:
    """The least `--ram-limit` that starts `edge-kv run`, and the peak of such a run."""
    limit = least_limit(root, engine, python)
    long = ["In those days " * 60, "--raw", "--max-new-tokens", "64"]
    return {"limit": limit, "peak": peak_under(root, engine, limit, *long, python=python)}


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
    opening = [r["measured"]["load"]["anon"] - r["measured"]["load"]["held"] for r in rows]
    opened, layer = solve([[1.0] * len(rows), [r["sizes"]["layers"] for r in rows]], loads)

    def work(phase: str) -> list[float]:
        return [
            r["measured"][phase]["anon"] - r["measured"]["load"]["held"] - tokenizer(r)
            - r["sizes"]["state"]
            for r in rows
        ]  # fmt: skip

    chunks = [4.0 * min(r["sizes"]["chunk"], r["depth"]) * r["sizes"]["row"] for r in rows]
    ones = [1.0] * len(rows)
    kept, logits, running = solve(  # rows of logits: of the token and of all its drafts
        [chunks, [4.0 * r["sizes"]["vocab"] for r in rows], ones], work("decode")
    )
    copies, _ = solve([chunks, ones], work("prefill"))
    code = [r["measured"]["decode"]["file"] - r["sizes"]["dense"] for r in rows]
    found = {
        "opened": opened, "layer": layer, "copies": copies, "kept": kept,
        "logits, drafts' too": logits, "running": running, "opening": float(np.median(opening)),
        "code, tokenizer's too": float(np.median(code)),
    }  # fmt: skip
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
    parser.add_argument("--model", action="append", choices=[*FITTED, *CHECKED])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fit", action="store_true", help="print the costs that fit best")
    parser.add_argument("--python", help="the command of another Python")
    parser.add_argument("--result", default="memory_model")
    args = parser.parse_args()
    python = shlex.split(args.python) if args.python else [sys.executable]
    version = subprocess.run([*python, "--version"], capture_output=True, text=True, check=True)
    rows = []
    for model in args.model or [*FITTED, *CHECKED]:
        for engine in args.engines.split(","):
            root = exported(model, args.work).absolute()
            row = alone(python, root, engine, args.threads)
            use = "fit" if model in FITTED else "check"
            rows.append({"model": model, "engine": engine, "use": use, **row})
            if weights_of(model) != "random":
                rows[-1]["ram_limit"] = under_limit(root, engine, tuple(python))
            say(f"{model} on {engine}")
    if args.fit:
        for engine in args.engines.split(","):
            found = best_costs([r for r in rows if r["engine"] == engine and r["use"] == "fit"])
            print(engine, json.dumps(found, indent=1))
        return
    held = [ok for r in rows for *_, ok in judged(r)]
    promise = {"within": WITHIN, "or_bytes": OR_BYTES, "held": sum(held), "of": len(held)}
    content = {"python": version.stdout.split()[-1], "depth": DEPTH, "promise": promise}
    write_result(args.result, {**content, "rows": rows})
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
