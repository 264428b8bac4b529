"""What a pass of several tokens costs, as a multiple of a pass of one.

    python benchmarks/pass_cost.py ARTIFACT --engines onnx,executorch --depths 0,32768

Passes of every number of tokens take turns over one state of random rows, each of them rewound;
every engine and artifact runs in a process of its own, and those take turns too. With `--beside`,
an artifact of the same model that was exported with `--drafts 0`, the rows also say what one token
costs through a program that takes no more.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from common import answer_of, ask_worker, numbers, random_states, run_main, say, show, write_result

from edge_kv.artifact import read_artifact
from edge_kv.runtime import load


def main() -> None:
    args = _arguments()
    roots = [args.artifact, *([args.beside] if args.beside else [])]
    states = {
        (root, engine): random_states(root, engine, args.threads, args.depths)
        for root in roots
        for engine in args.engines
    }
    rows = []
    for depth in args.depths:
        found: dict[tuple[Path, str], dict[int, list[float]]] = {}
        for _ in range(args.rounds):
            for engine in args.engines:
                for root in roots:
                    seconds = found.setdefault((root, engine), defaultdict(list))
                    answer = ask_worker(
                        __file__, root, engine, states[root, engine][depth], args.threads,
                        args.repeats, ",".join(map(str, args.tokens)),
                    )  # fmt: skip
                    for count, times in answer_of(answer).items():
                        seconds[int(count)] += times
        for engine in args.engines:
            rows += _rows(engine, depth, *(found[root, engine] for root in roots))
            say(json.dumps(rows[-1]))
    artifact = read_artifact(args.artifact)
    write_result(
        args.result or f"pass_cost_{artifact.root.name}",
        {
            "artifact": artifact.root.name,
            "drafts": artifact.plan.drafts,
            "threads": args.threads,
            "passes": args.rounds * args.repeats,
            "rows": rows,
        },
    )
    show("Milliseconds of a pass, and their multiple of one token", rows)


def _rows(
    engine: str, depth: int, seconds: dict[int, list[float]],
    alone: dict[int, list[float]] | None = None,
) -> list[dict[str, object]]:  # fmt: skip
    medians = {count: float(np.median(times)) for count, times in sorted(seconds.items())}
    rows: list[dict[str, object]] = [
        {
            "engine": engine, "depth": depth, "tokens": count,
            "milliseconds": round(1e3 * median, 4), "multiple": round(median / medians[1], 3),
        }
        for count, median in medians.items()
    ]  # fmt: skip
    if alone:
        fixed = float(np.median(alone[1]))
        rows[0] |= {
            "one_token_program": round(1e3 * fixed, 4),
            "of_it": round(medians[1] / fixed, 3),
        }
    return rows


def _work(root: str, engine: str, snapshot: str, threads: str, repeats: str, tokens: str) -> None:
    seconds: dict[int, list[float]] = defaultdict(list)
    with load(root, engine, threads=int(threads)) as session:
        if snapshot:
            session.restore(snapshot)
        counts = [n for n in numbers(tokens) if n <= session.drafts + 1]
        vocab = session.artifact.tokens.vocab
        rng = np.random.default_rng(7)
        for turn in range(int(repeats) + 2):
            for count in rng.permutation(counts).tolist():
                ids = rng.integers(0, vocab, count)
                begin = time.perf_counter()
                session.decode_many(ids)
                spent = time.perf_counter() - begin
                session.rewind(count)
                if turn > 1:  # the first ones bring weights into memory
                    seconds[count].append(spent)
    print(json.dumps(seconds))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--beside", type=Path, help="the same model, exported with --drafts 0")
    parser.add_argument("--engines", type=lambda text: text.split(","), default=["onnx"])
    parser.add_argument("--depths", type=numbers, default=[0])
    parser.add_argument("--tokens", type=numbers, default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each engine")
    parser.add_argument("--repeats", type=int, default=10, help="passes of each in a process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--result", help="name in results/")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main, _work)
