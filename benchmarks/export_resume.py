"""An export killed again and again at full size: it goes on, repeats nothing, ends the same.

    edge-kv export --model e2b --ctx 32768 --weights random --backend onnx --out a/e2b
    python benchmarks/export_resume.py --reference a/e2b --out b/e2b --kills 12 -- \
        --model e2b --ctx 32768 --weights random --backend onnx

Each start of the same command is killed (SIGKILL, children included) after a random time; the last
one runs to its end. Between them the journal of finished tensors is read: it must only have grown,
without a name twice. The artifact is compared with `--reference`, which ran uninterrupted: every
file byte by byte, the manifest included. Writes results/resume_NAME.json.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import EXPORT, run_main, say, write_result

from edge_kv.errors import RuntimeFault
from edge_kv.files import unfinished


def main() -> None:
    args = _arguments()
    rng = np.random.default_rng(args.seed)
    part = unfinished(args.out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    command = [*EXPORT, *args.args, "--out", str(args.out)]
    journals: dict[str, list[str]] = {}
    kills = []
    while len(kills) < args.kills and not args.out.exists():
        limit = float(rng.uniform(args.shortest, args.longest))
        if run(command, limit):
            break
        journals = grown(journals, part)
        kills.append({"seconds": round(limit, 1), "finished": sum(map(len, journals.values()))})
        say(f"killed after {limit:.1f} s: {kills[-1]['finished']} tensors and parts are finished")
    if not args.out.exists() and not run(command, None):
        raise RuntimeFault("The export that was left alone did not end; look at its output.")
    names = files(args.out)
    equal, odd, failed = filecmp.cmpfiles(args.reference, args.out, names, shallow=False)
    missing = set(files(args.reference)) ^ set(names)
    write_result(
        args.result or f"resume_{args.out.name}",
        {
            "arguments": args.args,
            "kills": kills,
            "equal_files": {n: (args.out / n).stat().st_size for n in sorted(equal)},
            "different_files": sorted([*odd, *failed, *missing]),
            "passed": not odd and not failed and not missing,
        },
    )


def run(command: list[str], limit: float | None) -> bool:
    """Whether the export ended by itself; after `limit` seconds it and its children are killed.

    Raises:
        RuntimeFault: it ended with an error.
    """
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.5)  # children die a moment later
        return False
    if status:
        raise RuntimeFault(f"The export ended with status {status}.")
    return True


def grown(before: dict[str, list[str]], part: Path) -> dict[str, list[str]]:
    """The tensors that each journal in `part` says are finished, in order.

    Raises:
        RuntimeFault: one was forgotten or done twice.
    """
    now = {str(p.relative_to(part)): finished(p) for p in sorted(part.rglob("journal.jsonl"))}
    for name, earlier in before.items():
        if now.get(name, [])[: len(earlier)] != earlier:
            raise RuntimeFault(f"{name} forgot tensors that were finished; resuming is broken.")
    for name, done in now.items():
        if len(set(done)) != len(done):
            raise RuntimeFault(f"{name} has a tensor twice; resuming is broken.")
    return now


def finished(journal: Path) -> list[str]:
    """Names in complete lines: the last line may be cut by a kill."""
    lines = journal.read_text().splitlines(keepends=True)
    entries: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry["name"] for entry in entries if "name" in entry]


def files(root: Path) -> list[str]:
    return [str(p.relative_to(root)) for p in sorted(root.rglob("*")) if p.is_file()]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--reference", type=Path, required=True, help="the uninterrupted export")
    parser.add_argument("--out", type=Path, required=True, help="of the same name as --reference")
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--shortest", type=float, default=5, help="seconds until a kill, at least")
    parser.add_argument("--longest", type=float, default=60, help="… and at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", help="name in results/")
    parser.add_argument("args", nargs="+", help="after --: what follows edge-kv export")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
