"""Exports, snapshots and compilations killed at random moments: nothing half-written.

    python benchmarks/export_kills.py --kills 150 --snapshots 300 --libraries 40

For each backend tiny is exported once undisturbed; then the same command is started and killed
(SIGKILL, children included) after a random part of that time, again and again. A target that exists
after a kill has to be whole; every export that reaches its end is compared with the first byte by
byte, and the next one starts afresh. Snapshots are killed while they are written over each other:
what lies there has to be one of them, whole, and has to be taken up; the next one leaves nothing
beside it. Of the operator library a file under its final name has to be whole, and the next build
has to end and leave nothing else. Writes results/export_kills.json; what is not asked for (0) stays
there as it was.
"""

from __future__ import annotations

import argparse
import filecmp
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from common import EXPORT, read_result, run_main, say, write_result

from edge_kv.artifact import sha256_file
from edge_kv.errors import RuntimeFault
from edge_kv.files import unfinished
from edge_kv.runtime import load
from edge_kv.runtime.cache import CACHE_VARIABLE

MODEL = ["--model", "tiny", "--ctx", "64", "--chunk", "16", "--calibration", "none"]
RESULT, PARTS = "export_kills", ("backends", "snapshots", "libraries")
WRITTEN = 6  # snapshots in the time within which their writer is killed
BUILD = [
    sys.executable, "-c",
    "from edge_kv.runtime import native_library as n; print(n.build_onnx_operators())",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=150)
    parser.add_argument("--backends", default="onnx,executorch")
    parser.add_argument("--snapshots", type=int, default=300)
    parser.add_argument("--libraries", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="at most, per backend")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.snapshots:
        with tempfile.TemporaryDirectory() as folder:
            keep(kill_snapshots(args.snapshots, args.seed, Path(folder)), "snapshots")
    if args.libraries:
        with tempfile.TemporaryDirectory() as folder:
            keep(kill_builds(args.libraries, args.seed, Path(folder)), "libraries")
    backends = args.backends.split(",") if args.kills else []
    for i, backend in enumerate(backends):
        share = args.kills // len(backends) + (i < args.kills % len(backends))
        with tempfile.TemporaryDirectory() as folder:
            keep(kill(backend, share, args.minutes, args.seed, Path(folder)), "backends", backend)


def keep(found: dict[str, Any], part: str, name: str = "") -> None:
    """Put what was found into the result file; its other parts stay."""
    held = read_result(RESULT)
    result = {"arguments": MODEL} | {p: held[p] for p in PARTS if p in held}
    result[part] = {**result.get(part, {}), name: found} if name else found
    write_result(RESULT, result)


def kill_snapshots(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill processes that write snapshots of one session to one path, one after another.

    Raises:
        RuntimeFault: what lies there is not one of them, whole.
    """
    rng = np.random.default_rng(seed)
    path, root = folder / "talk.kv", folder / "tiny"
    export("onnx", root, None)
    kept = written = 0
    with load(root, "onnx-stock", threads=1) as session:  # no threads: it can be forked
        session.prefill([2, *range(10, 50)])

        def writer(numbers: Iterable[int]) -> int:
            if process := os.fork():
                return process
            try:
                for number in numbers:
                    session.snapshot(path, {"number": number})
            finally:
                os._exit(0)

        begin = time.monotonic()
        os.waitpid(writer(range(WRITTEN)), 0)
        longest = time.monotonic() - begin
        before = WRITTEN - 1
        for _ in range(kills):
            process = writer(itertools.count(before + 1))
            time.sleep(float(rng.uniform(0, longest)))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            number = session.restore(path)["number"]
            if number < before or session.pos != 41:
                raise RuntimeFault(f"After {number} snapshots, {before} lay there already.")
            kept, written = kept + (number == before), written + number - before
            before = number
        session.snapshot(path)
    if left := [p.name for p in folder.glob(".*.part")]:
        raise RuntimeFault(f"Beside {path.name} were left {', '.join(left)}.")
    say(f"{kills} kills of snapshots, {written} were written between them")
    return {"kills": kills, "written": written, "earlier_one_kept": kept}


def kill_builds(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill compilations of the ONNX operators; every other one starts in an empty cache.

    Raises:
        RuntimeFault: a library that is not whole, or a rest beside one.
    """
    rng = np.random.default_rng(seed)
    environment = {**os.environ, CACHE_VARIABLE: str(folder)}
    begin = time.monotonic()
    built = finish_build(environment, folder)
    longest, digest = time.monotonic() - begin, sha256_file(built)
    for done in range(kills):
        if done % 2 == 0:
            shutil.rmtree(folder / "native")
        with subprocess.Popen(
            BUILD,
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            time.sleep(float(rng.uniform(0, longest)))
            os.killpg(process.pid, signal.SIGKILL)
        found = list(folder.glob("native/*.so"))
        if any(sha256_file(library) != digest for library in found):
            raise RuntimeFault(f"{found} is not what an undisturbed build makes.")
        if done % 2:
            finish_build(environment, folder)
    finish_build(environment, folder)
    say(f"{kills} kills of compilations")
    return {"kills": kills, "seconds_undisturbed": round(longest, 1)}


def finish_build(environment: dict[str, str], folder: Path) -> Path:
    """Let a compilation end; the library, beside which no rest lies."""
    done = subprocess.run(BUILD, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeFault(f"A compilation ended with {done.stderr.strip()[-300:]}")
    library = Path(done.stdout.strip())
    names = {p.name for p in folder.glob("native/*")}
    rest = names - {library.name, f"{library.name}.sha256", "edge_kv_onnx.lock"}
    if rest:
        raise RuntimeFault(f"Beside the library lie {sorted(rest)}.")
    return library


def kill(backend: str, kills: int, minutes: float, seed: int, folder: Path) -> dict[str, Any]:
    """Kill exports `kills` times; every one that ends is compared with an undisturbed one.

    After `minutes` the export that runs is let come to its end.
    """
    rng = np.random.default_rng(seed)
    # The same name in another folder: the manifest holds it.
    whole, out = folder / "whole" / backend, folder / "killed" / backend
    begin = time.monotonic()
    export(backend, whole, None)
    longest = time.monotonic() - begin  # follows how busy the machine is
    done = ended = taken_up = 0
    while (more := done < kills and time.monotonic() - begin < 60 * minutes) or not out.exists():
        taken = unfinished(out).exists()
        taken_up += taken
        limit = float(rng.uniform(0, longest)) if more else None
        started = time.monotonic()
        if not export(backend, out, limit):
            done += 1
            if not out.exists():
                continue
        elif not taken:
            longest = time.monotonic() - started
        compare(whole, out)
        ended += 1
        say(f"{backend}: {done} kills, {ended} exports ended byte-identical")
        if more:
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
