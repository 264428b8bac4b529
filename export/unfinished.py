"""The unfinished export beside its target: who works on it, records that are whole or absent."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from edge_kv.errors import ExportError
from edge_kv.files import write_text


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write JSON so that a killed export leaves all of it or nothing; keys keep their order."""
    write_text(path, json.dumps(record))


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote; empty when it is not there or torn."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


@contextmanager
def sole_exporter(out: Path) -> Iterator[None]:
    """Be the only process that exports to `out`; a killed one holds nothing.

    Raises:
        ExportError: another process exports to it; the message says which.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    path = out.parent / f".{out.name}.lock"
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as e:
            raise _no_lock(path, str(e.strerror)) from e
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            os.close(lock)
            raise _no_lock(path, "it is no file")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one before may have removed the file between our two calls.
            ours = _is(path, lock)
        except BlockingIOError:
            holder = os.read(lock, 200).decode(errors="replace") or "another process"
            os.close(lock)
            raise ExportError(
                f"{out} is being exported by {holder}; wait for it, or choose another --out."
            ) from None
        if ours:
            break
        os.close(lock)
    try:
        now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _no_lock(path: Path, why: str) -> ExportError:
    return ExportError(
        f"{path}, which says who exports, cannot be used ({why}); remove it, or choose another "
        "--out."
    )


def _is(path: Path, descriptor: int) -> bool:
    """Whether `path` still names the file behind an open descriptor."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
