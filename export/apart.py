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
from edge_kv.export.quiet import quiet

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
        command = [sys.executable, "-c", f"from {__name__} import main; main()"]
        with subprocess.Popen([*command, str(job), str(answer)], stdin=subprocess.PIPE) as done:
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


def main() -> None:
    """What the fresh Python runs: the job file of its command line, into the answer file."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _answer(*map(Path, sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)


def _answer(job: Path, answer: Path) -> None:
    gc.set_threshold(RARELY)
    with quiet():  # what libraries say when they are imported
        work, args, kwargs = pickle.loads(job.read_bytes())
    try:
        result = work(*args, **kwargs)
    except EdgeKVError as e:
        result = e
    part = answer.with_suffix(".part")
    part.write_bytes(pickle.dumps(result))
    part.replace(answer)
