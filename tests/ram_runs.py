"""Runs of the command line under `--ram-limit`: the least limit that starts, and the peak then.

Used by test_memory.py, and by `benchmarks/memory_model.py`, which records more models.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

COMMAND = ("-c", "from edge_kv.cli import main; main()", "run")
SPARE = 1 << 19
# The peak of a process that was started by a small one: a large parent's would count as its own.
_PEAK = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
sys.exit(done.stderr) if done.returncode else print(peak)
"""


def least_limit(root: Path, engine: str, python: tuple[str, ...] = (sys.executable,)) -> int:
    """Bytes that a refusal of `edge-kv run ROOT --ram-limit` says the run needs, rounded up.

    What a process holds before it opens a model differs a little from one to the next.
    """
    command = [*python, *COMMAND, str(root), "a", "--engine", engine, "--ram-limit", "1m"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    needed = re.search(r"need up to ([\d.]+) ([kMG])B of RAM", done.stderr)
    assert done.returncode == 1 and needed, done.stderr
    number, unit = needed.groups()
    step = 10.0 ** -len(number.partition(".")[2])  # it is rounded to its last digit
    return round((float(number) + step) * {"k": 1e3, "M": 1e6, "G": 1e9}[unit]) + SPARE


def peak_under(
    root: Path, engine: str, limit: int, *options: str, python: tuple[str, ...] = (sys.executable,)
) -> int:
    """Peak RSS in bytes of a run of `options` that `limit` lets start."""
    run = [*python, *COMMAND, str(root), "--engine", engine, "--ram-limit", str(limit), *options]
    command = [sys.executable, "-c", _PEAK, *run]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
