"""Signals that end a command: what is being written is removed, children end, a line says why."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ENDING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # SIGINT is Python's own, KeyboardInterrupt
_BY_SIGNAL = 128  # a shell's status of a command that a signal ended is this plus its number
INTERRUPTED = _BY_SIGNAL + signal.SIGINT


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind the command, unless they are ignored (nohup)."""
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def say_of_cut_files() -> None:
    """End with a line where a mapped file is cut off while it is in use, instead of without one.

    The kernel tells the thread that reads behind the end by SIGBUS, which Python's own handlers
    never get to see: they run behind the instruction, and that is tried for ever.
    """
    if not hasattr(signal, "SIGBUS"):
        return
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    handler = kind(_cut_off)
    _kept.append(handler)  # the system holds no reference
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGBUS), handler)


_kept: list[object] = []


def _cut_off(number: int) -> None:
    with suppress(OSError):
        os.write(2, b"Error: A file was cut off while it was in use; copy it again.\n")
    os._exit(1)


_heard: list[int] = []


def ended_by() -> int:
    """The status of a command that a signal ends; 0: none was heard."""
    return _BY_SIGNAL + _heard[0] if _heard else 0


def _end(number: int, frame: FrameType | None) -> None:
    _heard.append(number)
    with suppress(OSError):  # not through sys.stderr, whose write this may have interrupted
        os.write(2, f"Ended by {signal.Signals(number).name}.\n".encode())
    raise SystemExit(_BY_SIGNAL + number)


@contextmanager
def hang_up(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have `handler` hear SIGHUP, as when a terminal is closed, unless it is ignored."""
    number = getattr(signal, "SIGHUP", None)
    alone = threading.current_thread() is threading.main_thread()  # others set no handlers
    if number is None or not alone or signal.getsignal(number) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
