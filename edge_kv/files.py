"""Files that several processes use: written whole or not at all, and locked while they are made.

A file is written beside its target under a name of this writer's own and renamed when it is
complete, so that two writers of one path both succeed and the last one's content stays. What a
writer that was killed left there is removed by the next writer of that path: files that are still
being written are locked. A link is followed to the file that it names. What is no regular file (a
terminal, a pipe, /dev/null) is written to as it is: a rename would replace the device by a file.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


LONGEST_TEXT = 64 << 20  # bytes: more than a million tokens, twice the largest tokenizer


def unfinished(out: Path) -> Path:
    """Where an export to `out` is kept until it is finished."""
    return out.parent / f".{out.name}.part"


def read_bounded(file: BinaryIO) -> bytes:
    """All of a text from outside, which may be a device or a pipe that never ends.

    Raises:
        OSError: it is longer than any context.
    """
    content = file.read(LONGEST_TEXT + 1)
    if len(content) > LONGEST_TEXT:
        raise OSError(errno.EFBIG, f"it holds more than {LONGEST_TEXT >> 20} MiB")
    return content


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
    _remove_left_parts(target)
    file, lock = _new_part(target)
    part = Path(file.name)
    try:
        with file:
            with suppress(OSError):  # of a file that is replaced
                part.chmod(target.stat().st_mode & 0o777)
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        with suppress(OSError):
            part.unlink()
        lock.close()


def _new_part(target: Path) -> tuple[BinaryIO, ExitStack]:
    """A new file beside `target`, and what keeps it locked until it is closed."""
    while True:
        part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
        file, lock = part.open("xb"), ExitStack()
        if sys.platform == "win32":  # which renames no file that is open
            return file, lock
        lock.callback(os.close, os.dup(file.fileno()))  # the lock outlives `file`
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if part.exists():  # nobody took it for a left one before it was locked
            return file, lock
        file.close()
        lock.close()


def _remove_left_parts(target: Path) -> None:
    """Remove unfinished files of `target` whose writers have ended."""
    if sys.platform == "win32":
        return
    name = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{16}\.part")
    with suppress(OSError):
        for part in [p for p in target.parent.iterdir() if name.fullmatch(p.name)]:
            with suppress(OSError), part.open("rb") as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is being written
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
            msvcrt.locking(f.fileno(), msvcrt.LK_LOCK, 1)
        else:
            fcntl.flock(f, fcntl.LOCK_EX)
        yield
