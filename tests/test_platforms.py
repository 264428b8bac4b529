"""What the runtime takes for granted of a system: nothing that only Linux has.

Windows and macOS are stood in for by taking away modules and functions they do not have; nobody ran
this on a real one.
"""

import json
import subprocess
import sys

import pytest

from edge_kv import runtime
from edge_kv.artifact import read_artifact

STUB = """
import json, os, sys, types
import mmap, numpy, onnxruntime, subprocess, tempfile  # theirs, with whatever they use
kind, root = sys.argv[1:]
if kind == "windows":
    for name in ("fcntl", "resource", "termios", "pwd", "grp", "tty", "pty", "readline"):
        sys.modules[name] = None  # importing it raises ModuleNotFoundError
    held = []
    sys.modules["msvcrt"] = types.SimpleNamespace(LK_LOCK=1, locking=lambda *a: held.append(a))
missing = {
    "windows": ("getuid", "getgid", "sysconf", "getloadavg", "sched_getaffinity", "pread",
                "posix_fadvise", "posix_fallocate", "uname"),
    "macos": ("sched_getaffinity", "posix_fadvise", "posix_fallocate"),
}[kind]
for name in missing:
    delattr(os, name)
for name in dir(mmap):
    if name.startswith("MADV_") or (kind == "windows" and name.startswith(("MAP_", "PROT_"))):
        delattr(mmap, name)
from pathlib import Path
read = Path.read_text
def without_proc(self, *a, **k):
    if str(self).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(self))
    return read(self, *a, **k)
Path.read_text = without_proc
platform, real = {"windows": "win32", "macos": "darwin"}[kind], sys.platform
sys.platform = platform
import edge_kv.files
sys.platform = real
import edge_kv.runtime.session
for module in (edge_kv.runtime.session, edge_kv.files):
    module.sys = types.SimpleNamespace(platform=platform)
import importlib, pkgutil, edge_kv.runtime
for module in pkgutil.iter_modules(edge_kv.runtime.__path__):
    if "executorch" not in module.name:
        importlib.import_module(f"edge_kv.runtime.{module.name}")
import edge_kv.cli, edge_kv.cli.report, edge_kv.shelf
from edge_kv.runtime.base import own_base
from edge_kv.memory import COSTS
from edge_kv.runtime.bench import machine
assert own_base("onnx") == COSTS["onnx"].typical
assert machine()["cores"] >= 1
with edge_kv.runtime.load(root, "onnx-stock", 1) as session:
    session.prefill(numpy.arange(3, 40))
    ids = [int(session.decode(5).argmax()) for _ in range(4)]
    session.snapshot(Path(sys.argv[2]).parent / f"{kind}.kv")
    session.restore(Path(sys.argv[2]).parent / f"{kind}.kv")
print(json.dumps(ids))
"""


@pytest.mark.parametrize("kind", ["windows", "macos"])
def test_the_runtime_needs_no_module_of_linux(kind, tiny_artifact):
    done = subprocess.run(
        [sys.executable, "-c", STUB, kind, str(tiny_artifact)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with runtime.load(read_artifact(tiny_artifact), "onnx-stock", 1) as session:
        import numpy

        session.prefill(numpy.arange(3, 40))
        assert json.loads(done.stdout) == [int(session.decode(5).argmax()) for _ in range(4)]
