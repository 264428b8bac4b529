"""What a drafter gains: time of a pass with 1 … 4 of its drafts, and tokens a second by acceptance.

    python benchmarks/assistant.py ARTIFACT --engines onnx,executorch --depths 0,32768

A turn makes the drafts and feeds them in one pass; turns of every number of drafts, and plain
decoding, take turns themselves over one state of random rows. Whether a draft is accepted is
INJECTED: it is drawn, so that weights of any kind show what an acceptance would give. A refused
draft is taken back and the next burst begins behind the last accepted one, as in generation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from common import answer_of, ask_worker, numbers, random_states, run_main, say, show, write_result

from edge_kv.artifact import read_artifact
from edge_kv.runtime import load
from edge_kv.runtime.session import Session

ACCEPTANCE = (0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> None:
    args = _arguments()
    passes, speed = [], []
    states = {e: random_states(args.artifact, e, args.threads, args.depths) for e in args.engines}
    for depth in args.depths:
        found: dict[str, dict[str, Any]] = {e: defaultdict(list) for e in args.engines}
        for _ in range(args.rounds):
            for engine in args.engines:
                answer = ask_worker(
                    __file__, args.artifact, engine, states[engine][depth], args.threads,
                    args.repeats, args.drafts, args.turns,
                )  # fmt: skip
                for key, values in answer_of(answer).items():
                    found[engine][key] += values
        for engine, times in found.items():
            median = {k: float(np.median(v)) for k, v in times.items()}
            one = median["pass 0"]
            for n in range(args.drafts + 1):
                whole = median[f"pass {n}"]
                passes.append({
                    "engine": engine, "depth": depth, "drafts": n,
                    "milliseconds": round(1e3 * whole, 4), "multiple": round(whole / one, 3),
                    "of it drafting": round(1e3 * median.get(f"drafting {n}", 0.0), 4),
                })  # fmt: skip
                say(json.dumps(passes[-1]))
            for rate in ACCEPTANCE:
                for n in range(1, args.drafts + 1):
                    turns, tokens, seconds = np.sum(times[f"run {rate} {n}"], axis=0)
                    speed.append({
                        "engine": engine, "depth": depth, "acceptance (injected)": rate,
                        "drafts": n, "tokens a pass": round(tokens / turns, 2),
                        "speed-up": round(one * tokens / seconds, 2),
                    })  # fmt: skip
    artifact = read_artifact(args.artifact)
    write_result(
        args.result or f"assistant_{artifact.root.name}",
        {
            "artifact": artifact.root.name,
            "weights": artifact.manifest.made["source"],
            "acceptance": "injected: drawn for each draft, whatever the model says",
            "threads": args.threads,
            "passes": passes,
            "speed": speed,
        },
    )
    show("Milliseconds of a pass with drafts, and its multiple of one token", passes)
    show("Speed against plain decoding; acceptance is injected", speed)


def _work(
    root: str, engine: str, snapshot: str, threads: str, repeats: str, drafts: str, turns: str
) -> None:
    found: dict[str, list[Any]] = defaultdict(list)
    rng = np.random.default_rng(7)
    with load(root, engine, threads=int(threads)) as session:
        if not session.has_drafter:
            raise SystemExit(f"{root} has no drafter for {engine}; export it with --assistant.")
        if snapshot:
            session.restore(snapshot)
        session.decode(1)
        counts = range(min(int(drafts), session.drafts) + 1)
        for turn in range(int(repeats) + 2):
            for n in rng.permutation(list(counts)).tolist():
                drafting, whole = _burst(session, n)
                session.rewind(n + 2)
                session.decode(1)  # a hidden state for the next burst
                if turn > 1:  # the first ones bring weights into memory
                    found[f"pass {n}"].append(whole)
                    found[f"drafting {n}"].append(drafting)
        for rate in ACCEPTANCE:
            for n in counts[1:]:
                session.restore(snapshot) if snapshot else session.reset()
                session.decode(1)
                passes, tokens, seconds = 0, 0, 0.0
                while passes < int(turns) and session.pos + n < session.plan.ctx:
                    seconds += _burst(session, n)[1]
                    right = next((i for i in range(n) if rng.random() >= rate), n)
                    session.rewind(n - right)
                    passes, tokens = passes + 1, tokens + right + 1
                found[f"run {rate} {n}"].append((passes, tokens, seconds))
    print(json.dumps(found))


def _burst(session: Session, n: int) -> tuple[float, float]:
    """Seconds of n drafts, and of them and the pass that feeds them."""
    token, hidden, ids = 1, session.hidden, [1]
    begin = time.perf_counter()
    for _ in range(n):
        assert hidden is not None
        draft = session.draft(token, hidden)
        token, hidden = draft.token, draft.hidden
        ids.append(token)
    drafted = time.perf_counter() - begin
    session.decode_many(ids) if n else session.decode(1)
    return drafted, time.perf_counter() - begin


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--engines", type=lambda text: text.split(","), default=["onnx"])
    parser.add_argument("--depths", type=numbers, default=[0])
    parser.add_argument("--drafts", type=int, default=4, help="most drafts of a pass")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each engine")
    parser.add_argument("--repeats", type=int, default=10, help="passes of each in a process")
    parser.add_argument("--turns", type=int, default=30, help="passes of each acceptance")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--result", help="name in results/")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main, _work)
