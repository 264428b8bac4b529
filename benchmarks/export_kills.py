"""Real exports killed at random moments: nothing half-written, and the end is byte-identical.

    python benchmarks/export_kills.py --kills 150 [--backends onnx,executorch]

For each backend tiny is exported once undisturbed; then the same command is started and killed
(SIGKILL, children included) after a random part of that time, again and again. A target that exists
after a kill has to be whole; every export that reaches its end is compared with the first byte by
byte, and the next one starts afresh. Writes results/export_kills.json.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import EXPORT, run_main, say, write_result

from edge_kv.errors import RuntimeFault
from edge_kv.export.unfinished import unfinished

MODEL = ["--model", "tiny", "--ctx", "64", "--chunk", "16"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=150)
    parser.add_argument("--backends", default="onnx,executorch")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    backends = args.backends.split(",")
    results = {}
    for i, backend in enumerate(backends):
        share = args.kills // len(backends) + (i < args.kills % len(backends))
        with tempfile.TemporaryDirectory() as folder:
            results[backend] = kill(backend, share, args.seed, Path(folder))
    write_result("export_kills", {"arguments": MODEL, "backends": results})


def kill(backend: str, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill exports `kills` times; every one that ends is compared with an undisturbed one."""
    rng = np.random.default_rng(seed)
    # The same name in another folder: the manifest holds it.
    whole, out = folder / "whole" / backend, folder / "killed" / backend
    begin = time.monotonic()
    export(backend, whole, None)
    longest = time.monotonic() - begin
    done = ended = taken_up = 0
    while done < kills or not out.exists():
        taken_up += unfinished(out).exists()
        limit = float(rng.uniform(0, longest)) if done < kills else None
        if not export(backend, out, limit):
            done += 1
            if not out.exists():
                continue
        compare(whole, out)
        ended += 1
        say(f"{backend}: {done} kills, {ended} exports ended byte-identical")
        if done < kills:
            shutil.rmtree(out)
    return {"kills": done, "ended_identical": ended, "taken_up": taken_up}


def export(backend: str, out: Path, limit: float | None) -> bool:
    """Whether the export ended by itself; after `limit` seconds it and its children are killed.

    Raises:
        RuntimeFault: it ended with an error.
    """
    command = [*EXPORT, *MODEL, "--backend", backend, "--out", str(out)]
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            _, said = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return False
    if process.returncode:
        raise RuntimeFault(f"An export ended with {said.decode().strip()[-400:]}")
    return True


def compare(whole: Path, other: Path) -> None:
    """Raises RuntimeFault unless two folders hold the same files, byte by byte, and no rest."""
    names = [
        sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
        for root in (whole, other)
    ]
    if names[0] != names[1]:
        raise RuntimeFault(f"{other} holds {names[1]}, expected {names[0]}.")
    _, odd, failed = filecmp.cmpfiles(whole, other, names[0], shallow=False)
    if odd or failed:
        raise RuntimeFault(f"{other} differs from {whole} in {', '.join([*odd, *failed])}.")
    if left := [p.name for p in other.parent.iterdir() if p.name.endswith((".part", ".lock"))]:
        raise RuntimeFault(f"Beside {other} were left {', '.join(left)}.")


if __name__ == "__main__":
    run_main(main)
