"""`make demo` and `make test` in clean systems: what they take, and whether they pass.

    python benchmarks/fresh_systems.py --systems debian-12 debian-13 --targets demo test

Each system is a root file system that mmdebstrap makes of Debian's or Ubuntu's packages, with
Python and make, and once with and once without a C++ compiler. The committed state of this checkout
is cloned into it. Needs root, mmdebstrap, 10 GB of disk a system, and the network of this machine;
--torch names a build of PyTorch for machines that cannot reach the index of CPU builds, and
--find-links a folder that has wheels of it. Systems and targets that are not measured again keep
what the result has of them; each target's entry names the commit that it ran.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import read_result, say, write_result

ROOT = Path(__file__).parent.parent
PACKAGES = "python3,python3-venv,python3-pip,make,git,ca-certificates"
COMPILER = "g++"
# What a chroot needs of this machine to reach package indexes the way it does.
SHARED = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
MOUNTED = {"proc": "proc", "sysfs": "sys", "devpts": "dev/pts"}  # kind -> where


@dataclass(frozen=True)
class System:
    """A release: its suite, and the mirror that has it."""

    suite: str
    mirror: str
    components: str = "main"  # of the archive


SYSTEMS = {
    "debian-12": System("bookworm", "http://deb.debian.org/debian"),
    "debian-13": System("trixie", "http://deb.debian.org/debian"),
    "ubuntu-24.04": System("noble", "http://archive.ubuntu.com/ubuntu", "main,universe"),
}
RUNTIME = (
    "python3 -m venv .venv && .venv/bin/pip install -q . && "
    ".venv/bin/edge-kv run /artifact 'In those days' --max-new-tokens 8"
)
"""The target `runtime`: the torch-free install, running an artifact from outside."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--targets", nargs="+", default=["demo", "test"])
    parser.add_argument("--compilers", nargs="+", choices=["with", "without"],
                        default=["without", "with"])  # fmt: skip
    parser.add_argument("--torch", help="the TORCH of the Makefile")
    parser.add_argument("--find-links", type=Path, help="a folder of wheels for pip")
    parser.add_argument("--artifact", type=Path, help="for the target runtime")
    parser.add_argument("--result", default="fresh_systems")
    args = parser.parse_args()
    for name in args.systems:
        for compiler in args.compilers:
            row = measure(name, compiler == "with", args)
            held = read_result(args.result).get("systems", [])
            rows = {(r["system"], r["compiler"]): r for r in held}
            key = name, compiler == "with"
            earlier = {k: v for k, v in rows.get(key, {}).items() if k != "fault"}
            rows[key] = earlier | row
            write_result(args.result, {"systems": [rows[k] for k in sorted(rows)]})


def measure(name: str, compiler: bool, args: argparse.Namespace) -> dict[str, Any]:
    """One system: its Python, and each target's status, time and disk."""
    row: dict[str, Any] = {"system": name, "compiler": compiler}
    home = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    try:
        root = home / "root"
        fault = clean_root(root, name, f"{PACKAGES},{COMPILER}" if compiler else PACKAGES)
        if fault:
            return {**row, "fault": fault}
        commit = run("git", "-C", str(root / "root/edge-kv"), "rev-parse", "HEAD").stdout.strip()
        if args.find_links:
            shutil.copytree(args.find_links, root / "wheels")
        if args.artifact:
            shutil.copytree(args.artifact, root / "artifact")
        row["python"] = inside(root, "python3 --version").stdout.split()[-1]
        for target in args.targets:
            torch = f" TORCH={args.torch}" if args.torch else ""
            command = RUNTIME if target == "runtime" else f"make {target}{torch}"
            begin = time.monotonic()
            links = "export PIP_FIND_LINKS=/wheels; " if args.find_links else ""
            done = inside(root, f"{links}cd /root/edge-kv && {command}")
            row[target] = {
                "command": command,
                "commit": commit,
                "status": done.returncode,
                "seconds": round(time.monotonic() - begin),
                "disk_mb": disk_mb(root / "root/edge-kv"),
                "last": last_line(done.stdout),
            }
            say(f"{name} {'with' if compiler else 'without'} g++: {target} {row[target]}")
            if done.returncode:
                say("\n".join([*done.stdout.splitlines()[-400:], *done.stderr.splitlines()[-20:]]))
    finally:
        for place in MOUNTED.values():
            run("umount", str(home / "root" / place))
        shutil.rmtree(home, ignore_errors=True)
    return row


def clean_root(root: Path, name: str, packages: str) -> str:
    """Make `root` the system `name` with `packages` and a clone of this checkout's commit.

    Returns what went wrong in one line, or nothing.
    """
    system = SYSTEMS[name]
    made = run("mmdebstrap", "--variant=apt", f"--components={system.components}",
               f"--include={packages}", system.suite, str(root), system.mirror)  # fmt: skip
    if made.returncode:
        faults = [line for line in made.stderr.splitlines() if line.startswith("E: ")]
        return (faults or [last_line(made.stderr)])[0][:300]
    for path in map(Path, SHARED):
        if path.exists():
            (root / path.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / path.relative_to("/"))
    for kind, place in MOUNTED.items():
        run("mount", "-t", kind, kind, str(root / place))
    cloned = run("git", "clone", "-q", str(ROOT), str(root / "root/edge-kv"))
    return last_line(cloned.stderr)


def inside(root: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a root file system, with a clean environment."""
    return run("env", "-i", "HOME=/root", "PATH=/usr/bin:/bin:/usr/sbin:/sbin", "LANG=C.UTF-8",
               "chroot", str(root), "sh", "-c", script)  # fmt: skip


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]


def disk_mb(folder: Path) -> int:
    return round(sum(p.lstat().st_size for p in folder.rglob("*")) / 1e6)


if __name__ == "__main__":
    main()
