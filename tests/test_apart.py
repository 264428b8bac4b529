"""A step in a process of its own: results and errors come back, an ended process is an error."""

import os
import signal
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
