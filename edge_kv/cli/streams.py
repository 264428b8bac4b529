"""The three streams of a command, as a stranger's shell may leave them."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper


def open_streams() -> None:
    """Make stdin, stdout and stderr usable: closed ones go nowhere, odd characters are replaced.

    A descriptor below 3 that stays closed would be given to the next file that is opened, and what
    is printed would end up in that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest descriptor there is: this one
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def flush_stdout() -> OSError | None:
    """Write what stdout still holds back; why that cannot be done, if so, and the rest is dropped.

    Python would try again when it exits, and end with a message and a status of its own.
    """
    try:
        sys.stdout.flush()
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return e
    return None
