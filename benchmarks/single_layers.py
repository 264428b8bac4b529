"""One layer of each kind of a model too large to run whole, at full width with random weights.

    python benchmarks/single_layers.py --model deepseek-v4-flash --kinds W,S,D \\
        --depths 4096,32768,131072 --work DIR

For each letter of `pattern` a model of that one layer is exported and decodes behind a state of
random rows. `--experts` and `--vocab` keep fewer experts and tokens than the model has, and the
result says how many: a token runs as many experts as ever, and the head, which no layer has, takes
little time. Beside time stand the bytes of state that the plan counts and what the process holds
more than at the start. Routing is that of random weights; every step decodes another random token.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import (
    answer_of,
    ask_worker,
    numbers,
    random_states,
    run_main,
    say,
    show,
    write_result,
)

from edge_kv import models
from edge_kv.artifact import read_artifact
from edge_kv.export import export_model
from edge_kv.runtime import load
from edge_kv.runtime.meter import read_memory

TOKENS = 16


def main() -> None:
    args = _arguments()
    config = models.get_row(args.model).config
    rows = []
    for kind in args.kinds.split(","):
        one = replace(
            config, layers=1, pattern=kind, hashed=int(kind == args.kinds[0]),
            experts=args.experts or config.experts, vocab=args.vocab or config.vocab,
        )  # fmt: skip
        root = args.work / f"{args.model}-{kind}"
        if not root.exists():
            begin = time.perf_counter()
            name = f"{args.model}-{kind}"
            models.ROWS[name] = replace(models.get_row(args.model), config=one)
            export_model(
                model=name, weights="random", ctx=max(args.depths) + 512, quant="int4",
                calibration="none", out=root, open_session=load,
            )  # fmt: skip
            say(f"{root.name} exported in {time.perf_counter() - begin:.0f} s")
        artifact = read_artifact(root)
        states = random_states(root, args.engine, args.threads, args.depths)
        for depth in args.depths:
            done = ask_worker(__file__, root, args.engine, states[depth], args.threads)
            row = {"layer": kind, "depth": depth, **answer_of(done)}
            plan = artifact.plan
            row |= {"state_planned": plan.bytes, "state_touched_planned": plan.touched(depth)}
            rows.append(row)
            say(json.dumps(row))
        if not args.keep:
            shutil.rmtree(root)
    write_result(
        args.result or f"layers_{args.model}_{args.engine}",
        {
            "model": args.model, "threads": args.threads,
            "experts": {"kept": one.experts, "of": config.experts},
            "vocab": {"kept": one.vocab, "of": config.vocab},
            "random": "weights, rows of the state, tokens", "rows": rows,
        },
    )  # fmt: skip
    show(f"{args.model}: one layer of each kind", rows)


def _work(root: str, engine: str, snapshot: str, threads: str) -> None:
    with load(root, engine, threads=int(threads)) as session:
        ids = np.random.default_rng(7).integers(0, session.artifact.tokens.vocab, 2 * TOKENS + 128)
        session.decode(int(ids[0]))
        before = read_memory().anon or 0
        session.restore(snapshot)
        held = (read_memory().anon or 0) - before
        for token in ids[:TOKENS]:  # brings experts and head into memory
            session.decode(int(token))
        seconds = []
        for token in ids[:TOKENS]:
            begin = time.perf_counter()
            session.decode(int(token))
            seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        session.prefill(ids[-session.plan.chunk :])
        prefill = session.plan.chunk / (time.perf_counter() - begin)
    print(
        json.dumps(
            {
                "token_seconds": float(np.median(seconds)),
                "prefill_rate": prefill,
                "state_measured": held,
            }
        )
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--kinds", required=True, help="letters of its pattern, by commas")
    parser.add_argument("--depths", type=numbers, default=[4096, 32_768, 131_072])
    parser.add_argument("--experts", type=int, help="routed experts that are kept")
    parser.add_argument("--vocab", type=int, help="tokens that are kept")
    parser.add_argument("--engine", default="onnx")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--keep", action="store_true", help="leave the artifacts in --work")
    parser.add_argument("--result", help="name in results/")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main, _work)
