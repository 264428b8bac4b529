"""Heap that is free and still resident: given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any


def release(library: Any) -> None:
    """Give back what the calling thread's steps worked in, and what is free besides.

    A chunk of a prompt works in tens of MB, a token in one.
    """
    library.edge_kv_release_scratch()
    trim()


def trim() -> None:
    """Give back what was freed (glibc only; a no-op elsewhere).

    A library that builds something large leaves its scratch on the free lists: two thirds of what
    reading a large tokenizer took, a block of the head after packing. What stays would be split
    among later allocations and never be free as a whole.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
