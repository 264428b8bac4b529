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
from math import log2
from pathlib import Path
from typing import NamedTuple

WINDOW = 65_536  # bytes around a touched one that every system maps, as far as they are in RAM
_PLACES = 16  # of a file that are touched to learn what a touch maps
_SMAPS = Path("/proc/self/smaps")
_PAGEMAP = Path("/proc/self/pagemap")
_ENTRY = 8  # bytes there for a page; the highest bit says whether it is mapped
_ABSENT = bytes(range(128))  # highest bytes of pages that are not
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


def doublings(path: Path) -> float:
    """How often `WINDOW` doubles to what touching one byte of a file maps now: mean of some places.

    Linux maps whole pieces of its page cache (from 6.18 on), and a file that was just written lies
    there in pieces as large as what was written at once. Only places that are in RAM are touched,
    nothing is read from storage. 0 where the system does not say.
    """
    try:
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY) as held:
            found = _touch(held)
    except (OSError, ValueError, AttributeError):  # no such file, an empty one, another system
        return 0.0
    return sum(log2(max(n, WINDOW) / WINDOW) for n in found) / max(len(found), 1)


def _touch(held: mmap.mmap) -> list[int]:
    """Bytes that each of some touches of `held` maps, one after the other."""
    first = ctypes.c_char.from_buffer(held)
    start, pages = ctypes.addressof(first), -(-len(held) // mmap.PAGESIZE)
    del first  # or it could not be closed
    cached = (ctypes.c_ubyte * pages)()
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(held)), cached):
        return []
    found = []
    with _PAGEMAP.open("rb") as table:
        for page in (pages * (2 * i + 1) // (2 * _PLACES) for i in range(_PLACES)):
            if cached[page] & 1:
                held.madvise(mmap.MADV_DONTNEED)
                _ = held[page * mmap.PAGESIZE]
                table.seek(start // mmap.PAGESIZE * _ENTRY)
                present = table.read(pages * _ENTRY)[_ENTRY - 1 :: _ENTRY]
                found.append(len(present.translate(None, _ABSENT)) * mmap.PAGESIZE)
    return found


def _drop(pages: Iterable[Mapping]) -> None:
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    advise = ctypes.CDLL(None).madvise
    for m in pages:
        if not m.dirty:
            advise(ctypes.c_void_p(m.start), ctypes.c_size_t(m.bytes), mmap.MADV_DONTNEED)
