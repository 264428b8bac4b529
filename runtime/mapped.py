"""Mapped weight files: which pages of them this process holds, and how to let go of them.

Two programs that map one file map each page twice. The page is in RAM once, but it counts twice in
what the kernel reports as resident, and the page tables are there twice: a session therefore lets
go of one program's pages when it turns to the other. They stay in the page cache; touching them
again costs a fault for every 64 KB, about 20 ms a gigabyte.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")
Span = tuple[int, int]  # address and bytes


def spans(folder: Path) -> set[Span]:
    """Where files in `folder` are mapped now; empty where the system does not say."""
    return {span for span, _ in _clean_and_dirty(str(folder.resolve()))}


def let_go(held: set[Span], folder: Path) -> None:
    """Drop the pages of those mappings of files in `folder` that were never written to."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    advise = ctypes.CDLL(None).madvise
    for span, dirty in _clean_and_dirty(str(folder.resolve())):
        if span in held and not dirty:
            advise(ctypes.c_void_p(span[0]), ctypes.c_size_t(span[1]), mmap.MADV_DONTNEED)


def _clean_and_dirty(folder: str) -> list[tuple[Span, bool]]:
    """Mappings of files in `folder`, and whether a page of them is a private, changed copy."""
    try:
        text = _SMAPS.read_text()
    except OSError:
        return []
    found: list[tuple[Span, bool]] = []
    current: Span | None = None
    for line in text.splitlines():
        head = line.split(None, 5)
        if "-" in head[0] and not head[0].endswith(":"):
            start, stop = (int(part, 16) for part in head[0].split("-"))
            inside = len(head) == 6 and head[5].startswith(f"{folder}/")
            current = (start, stop - start) if inside else None
        elif current and head[0] == "Anonymous:":
            found.append((current, head[1] != "0"))
    return found
