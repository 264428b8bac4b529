"""Runs one step of an export in a process of its own, so that all its memory is given back.

Lowering leaves hundreds of megabytes that Python's and torch's allocators keep; a gate that runs
after it in the same process would pay for them.
"""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from edge_kv.errors import EdgeKVError, ExportError

_Result = TypeVar("_Result")
RARELY = 200_000  # allocations between two collections: graphs are millions of live objects


def apart(work: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
    """`work(*args, **kwargs)` in a fresh Python; a module-level function, picklable arguments.

    Raises:
        EdgeKVError: what `work` raised. ExportError: the process was ended from outside.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, answer = Path(folder) / "job", Path(folder) / "answer"
        job.write_bytes(pickle.dumps((work, args, kwargs)))
        command = [sys.executable, "-m", __name__, str(job), str(answer)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as done:
            done.wait()
        if not answer.is_file():
            raise ExportError(
                f"The process that ran {work.__name__} ended with status {done.returncode}; if "
                "the system was out of memory, close other programs and run the same command "
                "again: it continues where it stopped."
            )
        result = pickle.loads(answer.read_bytes())
    if isinstance(result, EdgeKVError):
        raise result
    return result


def _end_with_parent() -> None:
    """End this process when the one that started it does: its end of the pipe closes."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _main(job: Path, answer: Path) -> None:
    gc.set_threshold(RARELY)
    work, args, kwargs = pickle.loads(job.read_bytes())
    try:
        result = work(*args, **kwargs)
    except EdgeKVError as e:
        result = e
    part = answer.with_suffix(".part")
    part.write_bytes(pickle.dumps(result))
    part.replace(answer)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _main(Path(sys.argv[1]), Path(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
