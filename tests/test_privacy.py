"""What the commands leave on a machine and whom they ask: nothing outside the cache, and nobody."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_artifact import write_artifact

STRACE = shutil.which("strace")
OPENED = re.compile(r'open(?:at)?\((?:AT_FDCWD, )?"([^"]+)", [^)]*O_(?:WRONLY|RDWR)')


@pytest.mark.skipif(not STRACE, reason="system calls are watched by strace; apt install strace")
@pytest.mark.parametrize(
    "command",
    [
        "plan --model e2b --ctx 32k",
        "inspect {artifact}",
        "verify {artifact} --engine onnx-stock",
        "run {artifact} Hello --max-new-tokens 2 --engine onnx-stock",
    ],
)
def test_a_command_opens_no_socket_and_writes_nothing_outside_the_cache(tmp_path, command):
    artifact = write_artifact(tmp_path / "a")
    home, log, cache = tmp_path / "home", tmp_path / "calls", tmp_path / "cache"
    home.mkdir()
    words = command.format(artifact=artifact).split()
    done = subprocess.run(
        [STRACE, "-f", "-qq", "-e", "trace=socket,open,openat", "-o", log,
         sys.executable, "-B", "-m", "edge_kv", *words],
        capture_output=True, text=True, check=False,
        env={**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"),
             "EDGE_KV_CACHE": str(cache),
             "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = log.read_text()
    assert "socket(" not in calls
    own = ("/dev/", "/proc/", f"{cache}/")
    written = {p for p in OPENED.findall(calls) if not p.startswith(own)}
    assert not written
    assert not list(home.iterdir())


def test_onnxruntime_is_imported_where_its_telemetry_is_switched_off():
    root = Path(__file__).parent.parent
    trees = [root / "edge_kv", root / "export", root / "runtime", root / "benchmarks"]
    found = {
        path.relative_to(root).as_posix()
        for tree in trees
        for path in tree.rglob("*.py")
        if re.search(r"^\s*(import onnxruntime\b|from onnxruntime\b)(?!_)", path.read_text(), re.M)
    }
    assert {p.removeprefix("edge_kv/") for p in found} == {"runtime/ort.py"}
