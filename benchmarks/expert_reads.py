"""How experts that do not fit in memory are best read: the page cache, hints to it, or a bank.

    python benchmarks/expert_reads.py FILE --limits 4g,2g --layers 40 --experts 16 --chosen 1 \\
        --bytes 12976128 --skew 0,1

`expert_reads.cpp` chooses experts as a router would (`skew` s: expert i as often as (i + 1)^-s, 0:
all alike) and reads each of them once, with as many threads as a decoder has. FILE is any file of
at least layers x experts x bytes. Ways to read:

map       the mapped file, page by page as it is touched
willneed  the same, after one hint (MADV_WILLNEED) for each expert that was chosen
ahead     the same, with a hint for what the next layer chose at the token before
bank      pread into an LRU of whole experts in anonymous memory, which takes 80 % of the limit
direct    the same with O_DIRECT, past the page cache

Ways take turns, round after round, in a memory cgroup without swap; the page cache forgets the file
before each. Writes results/expert_reads.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from common import run_main, say, show, write_result
from memory_limits import forget, memory_group

from edge_kv.amounts import parse_bytes
from edge_kv.errors import RuntimeFault

WAYS = ("map", "willneed", "ahead", "bank", "direct")
BANK_SHARE = 0.8


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "expert_reads"
        source = Path(__file__).with_suffix(".cpp")
        subprocess.run(
            ["g++", "-std=c++20", "-O2", "-march=native", "-pthread", source, "-o", program],
            check=True,
        )
        rows = [
            {
                "limit": limit,
                "skew": skew,
                "round": i,
                **_read(program, way, limit, skew, args),
            }
            for limit in (parse_bytes(x) for x in args.limits.split(","))
            for skew in map(float, args.skew.split(","))
            for i in range(args.rounds)
            for way in args.ways.split(",")
        ]
    summary = _summarise(rows)
    shape = {k: getattr(args, k) for k in ("layers", "experts", "chosen", "bytes", "threads")}
    write_result(
        args.result,
        {"shape": shape, "bank_share": BANK_SHARE, "summary": summary, "rows": rows},
    )
    show("Seconds a token, medians", summary)


def _read(
    program: Path, way: str, limit: int, skew: float, args: argparse.Namespace
) -> dict[str, Any]:
    forget(args.file.parent)
    command = [
        program, args.file, way, f"layers={args.layers}", f"experts={args.experts}",
        f"chosen={args.chosen}", f"bytes={args.bytes}", f"tokens={args.tokens}",
        f"warm={args.warm}", f"skew={skew}", f"threads={args.threads}",
        f"bank={int(limit * BANK_SHARE)}",
    ]  # fmt: skip
    with memory_group(limit) as group:
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True, text=True, preexec_fn=group.enter,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeFault(f"expert_reads ended with status {done.returncode}: {done.stderr}")
    row: dict[str, Any] = json.loads(done.stdout)
    say(f"{limit >> 20} MiB, skew {skew}, {way}: {row['seconds_per_token']:.3f} s a token")
    return row


def _summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = ("limit", "skew", "mode")
    out = []
    for case in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        mine = [row for row in rows if tuple(row[k] for k in keys) == case]
        measured = ("seconds_per_token", "worst", "storage_bytes_per_token")
        out.append(
            dict(zip(keys, case, strict=True))
            | {key: median(row[key] for row in mine) for key in measured}
        )
    return out


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--limits", default="4g,2g")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--chosen", type=int, default=1)
    parser.add_argument("--bytes", type=int, default=12_976_128)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--warm", type=int, default=16)
    parser.add_argument("--skew", default="0,1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--result", default="expert_reads")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
