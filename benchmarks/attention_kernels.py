"""Attention alone: time for a layer by instruction set, depth, tokens, KV heads and storage.

    python benchmarks/attention_kernels.py        results/attention_kernels.json

Layers are E2B's, E4B's, Laguna's and SmolLM2's: eight query heads on one or two KV heads, 512 wide
with full attention (int8 rows), 256 wide with a window of 512 (f32 and f16 rows); 48 on eight, 128
wide; nine on three, 64 wide. A step of 1, 2, 4 or 8 tokens is what decoding with drafts takes, one
of 128 a chunk of prefill; `of one token` is its time beside a step of one. Runs of the instruction
sets alternate; the times are medians. GB/s count the state's bytes once.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import run_main, say, show, write_result

from edge_kv.runtime.native_library import ISAS, build_kernels

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from native_call import Attribute, Tensor, attribute_of, tensor_of

THREADS = 2


@dataclass(frozen=True)
class Case:
    """One layer and step: `depth` rows are seen by the last token."""

    storage: str
    dim: int
    depth: int
    tokens: int
    window: int = 0
    kv_heads: int = 1
    heads: int = 8

    @property
    def slots(self) -> int:
        return self.window + self.tokens - 1 if self.window else self.depth

    @property
    def state_bytes(self) -> int:
        rows = min(self.depth, self.slots)
        width = {"f32": 4, "f16": 2, "int8": 1}[self.storage]
        row = self.dim * width + (4 if self.storage == "int8" else 0)
        return 2 * rows * self.kv_heads * row


FEW = (1, 2, 4, 8)
CASES = [Case("int8", 512, 32768, tokens) for tokens in (*FEW, 128)]
CASES += [Case("int8", 512, 4096, 1), Case("int8", 512, 131072, 1)]
CASES += [Case("int8", 512, 32768, tokens, kv_heads=2) for tokens in FEW]
CASES += [Case("int8", 256, 32768, tokens, kv_heads=2) for tokens in FEW]
CASES += [Case("int8", 128, 32768, tokens, kv_heads=8, heads=48) for tokens in FEW]
CASES += [Case("int8", 64, 8192, tokens, kv_heads=3, heads=9) for tokens in FEW]
CASES += [Case("f32", 512, 32768, tokens) for tokens in FEW]
CASES += [Case(s, 256, 32768, t, window=512) for s in ("f32", "f16") for t in (*FEW, 128)]


class Problem:
    """Filled tables of a case and a step over them."""

    def __init__(self, case: Case):
        rng = np.random.default_rng(0)
        self.case = case
        shape = (case.slots, case.kv_heads, case.dim)
        if case.storage == "int8":
            block = [
                rng.integers(-127, 128, (min(4096, shape[0]), *shape[1:]), np.int8) for _ in "kv"
            ]
            self.rows = [np.resize(b, shape) for b in block]
        else:
            kind = {"f32": np.float32, "f16": np.float16}[case.storage]
            self.rows = [rng.normal(size=shape).astype(kind) for _ in "kv"]
        self.scales = [rng.uniform(0.005, 0.02, (*shape[:2], 1)).astype(np.float32) for _ in "kv"]
        self.q = rng.normal(size=(case.tokens, case.heads, case.dim)).astype(np.float32)
        self.out = np.empty_like(self.q)

    def run(self, library: ctypes.CDLL, isa: str) -> float:
        """Seconds of one step; infinite where the CPU has no such kernels."""
        case = self.case
        scales = self.scales if case.storage == "int8" else [None, None]
        pos = np.array([case.depth - case.tokens])
        inputs = [self.q, pos, None, self.rows[0], scales[0], self.rows[1], scales[1]]
        tensors = (Tensor * 13)(*map(tensor_of, inputs))
        values = (Attribute * 3)(*map(attribute_of, (case.dim**-0.5, [1], [case.window])))
        outputs, why = (Tensor * 1)(tensor_of(self.out)), ctypes.create_string_buffer(300)
        begin = time.perf_counter()
        failed = library.edge_kv_call(
            isa.encode(), THREADS, b"attend", tensors, values, outputs, why, len(why)
        )
        took = time.perf_counter() - begin
        assert failed != 2, why.value
        return float("inf") if failed else took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="for an instruction set in a case"
    )
    parser.add_argument("--isas", nargs="*", help="only these")
    given = parser.parse_args()
    known = [isa for machine in ISAS.values() for isa in machine if isa != "scalar"]
    library = ctypes.CDLL(str(build_kernels()))
    tiny = Problem(Case("f16", 256, 512, 1, 512))
    isas = [
        isa
        for isa in known
        if (not given.isas or isa in given.isas) and tiny.run(library, isa) != float("inf")
    ]
    found: list[dict[str, Any]] = []
    one: dict[str, float] = {}
    for case in CASES:
        row = measure(library, case, isas, given.seconds)
        if case.tokens == 1:
            one = row["ms"]
        row["of_one_token"] = {isa: round(row["ms"][isa] / one[isa], 2) for isa in isas}
        found.append(row)
    show(
        f"Attention of one layer: ms (of one token), {THREADS} threads",
        (
            {n: r[n] for n in ("storage", "dim", "heads", "kv_heads", "depth", "window", "tokens")}
            | {isa: f"{r['ms'][isa]:.3g} ({r['of_one_token'][isa]})" for isa in isas}
            for r in found
        ),
    )
    write_result("attention_kernels", {"threads": THREADS, "cases": found})


def measure(library: ctypes.CDLL, case: Case, isas: list[str], seconds: float) -> dict[str, Any]:
    problem = Problem(case)
    slowest = max(problem.run(library, isa) for isa in isas)
    rounds = max(2, min(500, int(seconds / slowest)))
    times: dict[str, list[float]] = {isa: [] for isa in isas}
    for _ in range(rounds):
        for isa in isas:
            times[isa].append(problem.run(library, isa))
    ms = {name: round(median(x) * 1e3, 4) for name, x in times.items()}
    rate = {name: round(case.state_bytes / x / 1e6, 2) for name, x in ms.items()}
    say(f"{case}: {ms}")
    return {**asdict(case), "state_bytes": case.state_bytes, "rounds": rounds, "ms": ms,
            "least_ms": {name: round(min(x) * 1e3, 4) for name, x in times.items()},
            "gb_per_s": rate}  # fmt: skip


if __name__ == "__main__":
    run_main(main)
