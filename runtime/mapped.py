"""Mapped files: which pages of weights this process holds, and how to let go of them and of code.

Two programs that map one file map each page twice. The page is in RAM once, but it counts twice in
what the kernel reports as resident, and the page tables are there twice: a session therefore lets
go of one program's pages when it turns to the other. They stay in the page cache; touching them
again costs a fault for every 64 KB, about 20 ms a gigabyte.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

_SMAPS = Path("/proc/self/smaps")
Span = tuple[int, int]  # address and bytes


class Mapping(NamedTuple):
    """A part of a file in memory."""

    start: int
    bytes: int
    offset: int  # of the file
    path: str  # ends in " (deleted)" where the file is gone
    dirty: bool  # whether a page of it is a private, changed copy

    @property
    def span(self) -> Span:
        return self.start, self.bytes


def mappings(folder: Path) -> list[Mapping]:
    """Where files in `folder` are mapped now; empty where the system does not say."""
    inside = f"{folder.resolve()}/"
    return _mappings(lambda _, path: path.startswith(inside))


def _mappings(wanted: Callable[[str, str], bool]) -> list[Mapping]:
    """Files mapped now of which `wanted`(access, path) holds."""
    try:
        text = _SMAPS.read_text()
    except OSError:
        return []
    found: list[Mapping] = []
    head: list[str] = []
    for line in text.splitlines():
        words = line.split(None, 5)
        if "-" in words[0] and not words[0].endswith(":"):
            head = words if len(words) == 6 and wanted(words[1], words[5]) else []
        elif head and words[0] == "Anonymous:":
            start, stop = (int(part, 16) for part in head[0].split("-"))
            dirty = words[1] != "0"
            found.append(Mapping(start, stop - start, int(head[2], 16), head[5], dirty))
        elif head and words[0] == "Swap:" and words[1] != "0":  # such copies are not in RAM now
            found[-1] = found[-1]._replace(dirty=True)
    return found


def spans(folder: Path) -> set[Span]:
    """The places of `mappings`."""
    return {m.span for m in mappings(folder)}


def let_go(held: set[Span], folder: Path) -> None:
    """Drop the pages of those mappings of files in `folder` that were never written to."""
    _drop(m for m in mappings(folder) if m.span in held)


def let_go_of_code() -> None:
    """Drop the pages of libraries, as is done when a model was loaded.

    Loading runs through far more code than steps do. What runs on is mapped again as it is touched:
    with onnxruntime 15 MB of the 40 that a process holds.
    """
    _drop(_mappings(lambda access, path: "w" not in access and ".so" in Path(path).name))


def _drop(pages: Iterable[Mapping]) -> None:
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    advise = ctypes.CDLL(None).madvise
    for m in pages:
        if not m.dirty:
            advise(ctypes.c_void_p(m.start), ctypes.c_size_t(m.bytes), mmap.MADV_DONTNEED)
