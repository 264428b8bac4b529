"""Hard memory limits: the smallest one a long context decodes in, and what an export fits into.

    python benchmarks/memory_limits.py decode e2b/ --ctx 32768 --limits 2g,1536m,1g,768m
    python benchmarks/memory_limits.py export --limit 3g -- --model e2b --ctx 32768 --weights random

Each command runs in a memory cgroup of its own (v1 or v2, which needs root), without swap. Before
it, the page cache forgets the artifact, so that every page the command touches is charged to it.
`decode` restores a snapshot that ends at the context and decodes from there; it alternates with
runs without a limit. Writes results/limits_*.json or results/export_*.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import EXPORT, portable, run_main, say, show, write_result

from edge_kv.amounts import parse_bytes, parse_size
from edge_kv.artifact import read_artifact
from edge_kv.errors import ConfigError, RuntimeFault
from edge_kv.files import unfinished
from edge_kv.runtime.bench import MODULE, Job, fill_depths
from edge_kv.runtime.cache import cache_directory
from edge_kv.runtime.threads import thread_count

PROMPT = 512  # the room `edge-kv bench` leaves below a context: both restore the same snapshot
CGROUPS = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A memory cgroup: `limit` bytes hard, none without."""

    def __init__(self, limit: int | None):
        fields = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().split())
        own = {controllers: path for _, controllers, path in fields}
        self.v1 = "memory" in own
        parent = CGROUPS / "memory" if self.v1 else CGROUPS
        self.path = parent / own["memory" if self.v1 else ""].lstrip("/") / f"edge-kv-{os.getpid()}"
        try:
            self.path.mkdir()
            if limit:
                self._set("memory.limit_in_bytes" if self.v1 else "memory.max", limit)
                swap = ("memory.memsw.limit_in_bytes", limit) if self.v1 else ("memory.swap.max", 0)
                if (self.path / swap[0]).exists():
                    self._set(*swap)
        except OSError as e:
            raise ConfigError(
                f"Cannot make the memory group {self.path} ({e.strerror}); run as root on a "
                "system with memory cgroups."
            ) from e

    def _set(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))

    def enter(self) -> None:
        """Move the calling process (a child before exec) into the group."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak(self) -> int | None:
        """Highest charged bytes, page cache included."""
        path = self.path / ("memory.max_usage_in_bytes" if self.v1 else "memory.peak")
        return int(path.read_text()) if path.exists() else None

    @property
    def killed(self) -> bool:
        events = self.path / ("memory.oom_control" if self.v1 else "memory.events")
        return any(
            line.split() == ["oom_kill", n]
            for line in events.read_text().splitlines()
            for n in line.split()[1:]
            if n != "0"
        )

    def close(self) -> None:
        self.path.rmdir()


@contextmanager
def memory_group(limit: int | None) -> Iterator[MemoryGroup]:
    group = MemoryGroup(limit)
    try:
        yield group
    finally:
        group.close()


def forget(*folders: Path) -> None:
    """Drop the files in `folders` from the page cache."""
    os.sync()
    for path in (p for folder in folders if folder.exists() for p in folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def decode(args: argparse.Namespace) -> None:
    artifact = read_artifact(args.artifact)
    ctx = parse_size(args.ctx)
    start = ctx - PROMPT
    job = Job(
        "measure", str(args.artifact), args.engine, thread_count(args.threads), cache=True,
        depths=(start,), prompt=1, tokens=args.tokens, repeats=args.repeats, fill=args.fill,
    )  # fmt: skip
    say(f"state at {start:,} tokens: {fill_depths(job)[str(start)]}")
    runs = []
    for limit in (None, *(parse_bytes(x) for x in args.limits.split(",")), None):
        forget(Path(args.artifact), cache_directory())
        runs.append({"limit": limit, **measured(job, limit)})
        say(f"limit {limit}: {runs[-1].get('rate', 'killed')} tokens/s, peak {runs[-1]['peak']}")
    free = max(r["rate"] for r in runs if not r["limit"])
    for run in runs:
        run["of_unlimited"] = run["rate"] / free if run["rate"] else None
    name = args.result or f"limits_{artifact.manifest.name}_{args.engine}"
    write_result(name, {"artifact": artifact.manifest.name, "job": asdict(job), "runs": runs})
    show(
        f"Decoding at {ctx:,} tokens under hard memory limits",
        [
            {
                "limit_MiB": r["limit"] >> 20 if r["limit"] else "none",
                "tok/s": round(r["rate"], 2) if r["rate"] else "killed",
                "of_unlimited": f"{r['of_unlimited']:.0%}" if r["rate"] else "",
                "anonymous_MB": round(r["anon"] / 1e6) if r["rate"] else "",
                "peak_MiB": r["peak"] >> 20,
                "load_s": round(r["load"], 2) if r["rate"] else "",
            }
            for r in runs
        ],
    )


def measured(job: Job, limit: int | None) -> dict[str, Any]:
    """One measuring process in a group of its own."""
    with memory_group(limit) as group:
        done = subprocess.run(
            [sys.executable, "-m", MODULE],
            input=json.dumps({**asdict(job), "started": time.time()}),
            preexec_fn=group.enter, capture_output=True, text=True, check=False,
        )  # fmt: skip
        card = {"peak": group.peak, "killed": group.killed, "rate": None}
    if done.returncode:
        if not card["killed"] and "memory" not in done.stdout.lower():
            raise RuntimeFault(f"The measuring process failed: {done.stdout}{done.stderr}")
        return card
    run = json.loads(done.stdout.strip().splitlines()[-1])
    memory = run["memory"]
    return {
        **card,
        "rate": 1 / run["decode"]["seconds"]["p50"],
        "seconds": run["decode"]["seconds"],
        "load": run["load"]["seconds"],
        "first_token": run["load"]["start_to_first_token"],
        "anon": max(m["anon_peak"] for m in memory.values()),
        "rss_peak": memory["decode"]["rss_peak_so_far"],
    }


def export(args: argparse.Namespace) -> None:
    limit = parse_bytes(args.limit)
    command = [*EXPORT, *args.args]
    given = dict(zip(args.args, args.args[1:], strict=False))
    out = Path(given.get("--out", "."))
    if "--weights" in given:
        forget(Path(given["--weights"]))
    resumed = unfinished(out).exists()
    begin = time.perf_counter()
    with memory_group(limit) as group:
        done = subprocess.run(command, preexec_fn=group.enter, check=False)
        seconds = time.perf_counter() - begin
        card = {"limit": limit, "peak": group.peak, "killed": group.killed}
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeFault(f"The export ended with status {done.returncode} under {limit} bytes.")
    card |= {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    named = [portable(word) for word in args.args]
    card |= {"rss_peak": 1024 * usage.ru_maxrss, "arguments": named, "resumed": resumed}
    write_result(args.result, card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("decode", help="decode at a context under a list of limits")
    run.set_defaults(call=decode)
    run.add_argument("artifact", type=Path)
    run.add_argument("--ctx", default="32768")
    run.add_argument("--limits", default="2g,1536m,1g")
    run.add_argument("--engine", default="onnx")
    run.add_argument("--threads", type=int)
    run.add_argument("--tokens", type=int, default=8)
    run.add_argument("--repeats", type=int, default=2)
    run.add_argument("--fill", default="prefill", help="how the depth is reached: prefill, random")
    run.add_argument("--result", help="name in results/")
    lower = commands.add_parser("export", help="export under one limit")
    lower.set_defaults(call=export)
    lower.add_argument("--limit", required=True)
    lower.add_argument("--result", required=True, help="name in results/")
    lower.add_argument("args", nargs="+", help="after --: what follows edge-kv export")
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    run_main(main)
