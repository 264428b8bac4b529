"""The products of one decoded token of Gemma 4 E2B, by weight format, beside a plain read.

    python benchmarks/weight_kernels.py        results/weight_kernels.json

weight_kernels.cpp multiplies matrices of the model's shapes, 1.2 GB of them at 4 bits, with 1 … 8
tokens; every pass stands between two plain reads of as many bytes and is compared with them.
Nothing else of the model runs. QAT is the mix of the mobile release: 2, 4 and 8 bits a row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

from common import run_main, show, write_result

from edge_kv.runtime.native_library import KERNELS, SOURCES, build

PROGRAM = Path(__file__).with_suffix(".cpp")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", type=int, default=5, help="that count, after one that warms up")
    parser.add_argument("--isa", action="append", help="instruction set; default: the best one")
    parser.add_argument("--build", action="store_true", help="compile, and measure nothing")
    args = parser.parse_args()
    program = compiled()
    if args.build:
        return
    rows: list[dict[str, Any]] = []
    for isa in args.isa or [""]:
        for pages in ("plain", "huge"):
            rows += measured(program, args, isa, pages)
    conditions = {"threads": args.threads, "passes": args.passes}
    write_result("weight_kernels", {"conditions": conditions, "rows": rows})
    show("Products of an E2B token", table(rows))


def compiled() -> Path:
    link = ("-pthread", "-std=c++17", "-O3", "-march=native", f"-I{SOURCES}", str(PROGRAM))
    return build("weight_kernels", dict.fromkeys(KERNELS, ()), link)


def measured(program: Path, args: argparse.Namespace, isa: str, pages: str) -> list[dict[str, Any]]:
    """One run of the program: a row for each format and number of tokens."""
    command = [str(program), str(args.passes), str(args.threads), pages]
    with mock.patch.dict("os.environ", {"EDGE_KV_ISA": isa} if isa else {}):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each format, kernels and pages: one token against the read, more against one."""
    out: dict[tuple[str, ...], dict[str, Any]] = {}
    for r in rows:
        pages = "huge" if r["huge_pages"] else "4 KiB"
        line = out.setdefault(
            (r["format"], r["kernels"], pages),
            {"format": r["format"], "kernels": r["kernels"], "pages": pages, "bits": r["bits"]},
        )
        if r["tokens"] == 1:
            line |= {"MB": round(r["bytes"] / 1e6), "ms": r["ms"], "GB/s read": r["read_gbs"]}
            line |= {"of the read": r["of_read"]}
        else:
            line[f"T={r['tokens']}"] = r["of_one_token"]
    return list(out.values())


if __name__ == "__main__":
    run_main(main)
