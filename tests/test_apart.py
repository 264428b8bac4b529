"""A step in a process of its own: results and errors come back, an ended process is an error."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_kv.errors import ExportError, WeightsError
from edge_kv.export.apart import apart


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The other process imports this file by its name."""
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", here + os.pathsep + os.environ.get("PYTHONPATH", ""))


def add(a, b=0):
    return os.getpid(), a + b


def refuse(name):
    raise WeightsError(f"{name} is not finite.")


def end():
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_from_another_process():
    pid, total = apart(add, 2, b=3)
    assert total == 5 and pid != os.getpid()


def test_errors_arrive_as_they_were_raised():
    with pytest.raises(WeightsError, match=r"^embed is not finite\.$"):
        apart(refuse, "embed")


def test_an_ended_process_is_an_error():
    with pytest.raises(ExportError, match="end ended with status -9"):
        apart(end)


def test_it_ends_with_the_process_that_started_it(tmp_path):
    pid = tmp_path / "pid"
    code = (
        "from edge_kv.export.apart import apart; import subprocess, sys; "
        f"apart(subprocess.run, ['sh', '-c', 'echo $PPID > {pid}; exec sleep 2'])"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        while not (pid.is_file() and pid.read_text().strip()):
            assert parent.poll() is None
            time.sleep(0.01)
        parent.kill()
    child = int(pid.read_text())
    deadline = time.monotonic() + 10
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
