"""A session used for a long time: memory stays flat, logits stay those of a fresh session.

    python benchmarks/soak.py artifacts/tiny --engines onnx executorch --minutes 30

Seeded moves on one session of each engine: prompts of any length across chunks and ring wraps,
single steps, passes over drafts of which some are taken back, replies with prompt-lookup drafts
(adaptive and as many as a pass takes), rewinds, checkpoints, conversations resumed, copied aside
and put back, snapshots and resets. Every CHECK moves a second session is reset and fed the same
ids; its logits have to agree within the noise that chunks of other lengths make. Anonymous memory
is sampled all along; its peak in the last quarter may not exceed that of the second by more than
GROWTH. Writes results/soak.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import run_main, say, write_result

from edge_kv.errors import RuntimeFault
from edge_kv.runtime import Session, load
from edge_kv.runtime.generation import Trace, generate
from edge_kv.runtime.meter import read_memory
from edge_kv.runtime.session import Copy

CHECK = 40  # moves between two comparisons
NOISE = 0.05  # of the spread of logits: other chunks sum in another order, over 8-bit state
GROWTH = 2 << 20  # bytes


class Soak:
    """One session under seeded moves, and a second one to compare with."""

    def __init__(self, artifact: Path, engine: str, threads: int, folder: Path, seed: int) -> None:
        self.used: Session = load(artifact, engine, threads=threads)
        self.fresh: Session = load(artifact, engine, threads=threads)
        self.rng = np.random.default_rng(seed)
        self.path = folder / "soak.kv"
        self.kept: list[Copy] = []
        self.moves: dict[str, int] = {}
        self.drafted = 0  # ids that replies fed as drafts
        self.accepted = 0
        self.worst = 0.0

    def move(self) -> None:
        """One random use of the session."""
        room = self.used.plan.ctx - self.used.pos
        names = ["prefill", "steps", "drafts", "reply", "rewind", "checkpoint", "resume", "copy",
                 "put_back", "snapshot", "restore", "reset"]  # fmt: skip
        odds = np.array([10, 10, 10, 10, 4, 3, 3, 2, 2, 1, 1, 0.5])
        name = str(self.rng.choice(names, p=odds / odds.sum()))
        if name in ("prefill", "steps", "drafts", "reply") and room < 2:
            name = "reset"
        getattr(self, name)(room)
        self.moves[name] = self.moves.get(name, 0) + 1

    def ids(self, count: int) -> list[int]:
        return [int(i) for i in self.rng.integers(3, self.used.artifact.tokens.vocab, count)]

    def prefill(self, room: int) -> None:
        longest = min(room, 3 * self.used.plan.chunk)
        self.used.prefill(self.ids(int(self.rng.integers(1, longest + 1))))

    def steps(self, room: int) -> None:
        for token in self.ids(min(room, int(self.rng.integers(1, 12)))):
            self.used.decode(token)

    def drafts(self, room: int) -> None:
        """A few passes as a reply makes them: one token and drafts behind it, the last refused."""
        for _ in range(int(self.rng.integers(1, 6))):
            left = self.used.plan.ctx - self.used.pos
            fed = int(self.rng.integers(1, self.used.drafts + 2))
            if fed > left:
                return
            self.used.decode_many(self.ids(fed))
            self.used.rewind(int(self.rng.integers(0, fed)))

    def reply(self, room: int) -> None:
        """A text that repeats itself, and a reply to it with drafts: greedy or sampled."""
        trace, phrase = Trace(), self.ids(int(self.rng.integers(3, 9)))
        prompt = [*self.used.tokens, *(phrase * 3)][: self.used.plan.ctx - 1]
        drafts = int(self.rng.integers(1, self.used.drafts + 1))
        ids = generate(
            self.used, prompt, max_new_tokens=int(self.rng.integers(1, 30)),
            temperature=float(self.rng.choice([0.0, 0.3])), seed=int(self.rng.integers(1 << 30)),
            drafts=str(self.rng.choice(["auto", str(drafts)])), trace=trace,
        )  # fmt: skip
        for _ in ids:
            pass
        self.drafted += trace.drafted
        self.accepted += trace.accepted

    def rewind(self, room: int) -> None:
        self.used.rewind(int(self.rng.integers(0, self.used.max_rewind + 1)))

    def checkpoint(self, room: int) -> None:
        self.used.checkpoint(self.used.pos)

    def resume(self, room: int) -> None:
        at = int(self.rng.integers(0, self.used.pos + 1))
        self.used.resume([*self.used.tokens[:at], 2])

    def copy(self, room: int) -> None:
        self.kept = [*self.kept[-2:], self.used.copy()]

    def put_back(self, room: int) -> None:
        if self.kept:
            self.used.put_back(self.kept[int(self.rng.integers(len(self.kept)))])

    def snapshot(self, room: int) -> None:
        self.used.snapshot(self.path)

    def restore(self, room: int) -> None:
        if self.path.exists():
            self.used.restore(self.path)

    def reset(self, room: int) -> None:
        self.used.reset()

    def compare(self) -> None:
        """The next logits beside those of a session that read the same ids from the beginning.

        Raises:
            RuntimeFault: they differ by more than noise.
        """
        if self.used.pos == self.used.plan.ctx:
            self.used.rewind(1)
        self.fresh.reset()
        self.fresh.prefill(self.used.tokens)
        got, want = self.used.decode(2), self.fresh.decode(2)
        difference = float(np.abs(got - want).mean() / want.std())
        self.worst = max(self.worst, difference)
        if difference > NOISE:
            raise RuntimeFault(
                f"After {sum(self.moves.values())} moves the logits at position {self.used.pos} "
                f"differ by {difference:.3f} of their spread from those of a fresh session."
            )


def soak(artifact: Path, engine: str, threads: int, minutes: float, seed: int) -> dict[str, Any]:
    """Use one engine for so long.

    Raises:
        RuntimeFault: logits differ by more than noise.
    """
    begin, memory, compared = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        run = Soak(artifact, engine, threads, Path(folder), seed)
        with run.used, run.fresh:
            while time.monotonic() - begin < 60 * minutes:
                for _ in range(CHECK):
                    run.move()
                run.compare()
                compared += 1
                memory.append(read_memory().anon or 0)
    quarter = len(memory) // 4
    second, last = max(memory[quarter : 2 * quarter]), max(memory[3 * quarter :])
    say(f"{engine}: {sum(run.moves.values())} moves, memory {second} then {last} bytes")
    return {
        "engine": engine,
        "threads": threads,
        "minutes": minutes,
        "moves": run.moves,
        "drafts_of_replies": {"fed": run.drafted, "accepted": run.accepted},
        "comparisons": compared,
        "worst_difference": run.worst,
        "anon_peak_of_second_quarter": second,
        "anon_peak_of_last_quarter": last,
        "passed": last - second <= GROWTH,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--engines", nargs="+", default=["onnx", "executorch"])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [
        soak(args.artifact, engine, args.threads, args.minutes, args.seed)
        for engine in args.engines
    ]
    write_result("soak", {"artifact": args.artifact.name, "noise": NOISE, "engines": rows})


if __name__ == "__main__":
    run_main(main)
