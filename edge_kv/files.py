"""Files that several processes use: written whole or not at all, and locked while they are made.

A file is written beside its target under a name of this writer's own and renamed when it is
complete, so that two writers of one path both succeed and the last one's content stays. A link is
followed to the file that it names. What is no regular file (a terminal, a pipe, /dev/null) is
written to as it is: a rename would replace the device by a file.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def unfinished(out: Path) -> Path:
    """Where an export to `out` is kept until it is finished."""
    return out.parent / f".{out.name}.part"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes; it changes only if the block ends without an exception.

    Raises:
        OSError: the directory is missing, read-only or full.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with target.open("wb") as f:
            yield f
        return
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as f:
            with suppress(OSError):  # of a file that is replaced
                part.chmod(target.stat().st_mode & 0o777)
            yield f
            f.flush()
            os.fsync(f.fileno())
        part.replace(target)
    finally:
        with suppress(OSError):
            part.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace `path` by UTF-8 `text` (see `replacing`).

    Raises:
        OSError: as `replacing`.
    """
    with replacing(path) as f:
        f.write(text.encode())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for whoever holds it; it is free when its process ends.

    Raises:
        OSError: the file cannot be made.
    """
    with path.open("a") as f:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(f.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX)
        yield
