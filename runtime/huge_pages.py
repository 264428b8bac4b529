"""Weights and state in huge pages: a token reads all of them, and 4 KB pages cost time.

That is a tenth to a fifth for weights and a quarter for long state.

Weights: where a kernel can turn pages of a mapped file into huge ones, it is asked to, and they
stay pages that the system may drop. Elsewhere the weights are copied into anonymous memory at the
addresses where the file was mapped, so that whoever reads them need not know. Such a copy cannot be
dropped: it is made where memory is ample and somebody asked for it, by `load(…, huge_pages=True)`,
which is `--huge-pages` of the commands.

State: what has been filled of a table is put into huge pages where a kernel can do that to memory
in use, which takes no more of it than before (`FilledState`).
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
from collections.abc import Iterable
from collections.abc import Mapping as Named
from pathlib import Path
from typing import Any

import numpy.typing as npt

from edge_kv.plan import Plan
from edge_kv.runtime.available import available_memory
from edge_kv.runtime.mapped import Mapping, Span, mappings

log = logging.getLogger(__name__)
RESERVE = 256 << 20  # bytes that stay available beside a copy
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FIXED, _COLLAPSE = 0x10, 25  # MAP_FIXED and MADV_COLLAPSE of Linux, which Python does not name
_HUGE = 2 << 20  # bytes of a huge page; where they are larger, the system refuses
_TOKENS = 256  # between two looks at how far a state is filled


def use_huge_pages(held: Iterable[Span], folder: Path) -> int:
    """Put the mappings `held` of files in `folder` into huge pages; how many bytes now are.

    Nobody may read them meanwhile. 0 where the system has no huge pages, or too little memory.
    """
    spans = set(held)
    there = (m for m in mappings(folder) if not m.path.endswith(" (deleted)"))
    found = _disjoint([m for m in there if m.span in spans])
    total = sum(m.bytes for m in found)
    if not found or not _has_huge_pages():
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    if all(_advise(libc, m, _COLLAPSE) for m in found):
        return total
    available = available_memory()
    if available is None or available < total + RESERVE:
        left = "unknown" if available is None else f"{available >> 20} MB"
        log.warning(
            "The weights stay in pages of their file: a copy in huge pages takes %d MB more "
            "memory, and what is available is %s.", total >> 20, left,
        )  # fmt: skip
        return 0
    # All are replaced before any is filled: neighbours then share a huge page.
    done = [m for m in found if _replace(libc, m)]
    return sum(m.bytes for m in done if _fill(libc, m))


class FilledState:
    """Puts state into huge pages as it fills; attention over 32k int8 rows takes a quarter less.

    A huge page takes the place of 4 KB pages all of which hold rows, so that state takes no more
    memory than without. Kernels before Linux 6.1 cannot, and systems that have no huge pages left
    refuse; the state stays as it is then.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._looked = 0  # how many tokens there were
        self._done: dict[str, int] = {}  # addresses up to which a table was gone through
        self._ends = not _has_huge_pages()

    def cover(self, state: Named[str, npt.NDArray[Any]], end: int) -> int:
        """Put the rows of positions before `end` into huge pages; how many bytes of it are new."""
        if self._ends or 0 <= end - self._looked < _TOKENS:
            return 0
        self._looked = end
        libc, covered = ctypes.CDLL(None, use_errno=True), 0
        for table in self._plan.tables:
            rows = state[table.name]
            first = rows.ctypes.data
            filled = first + min(table.slots, end // table.stride) * rows.strides[0]
            begin = max(self._done.get(table.name, 0), -(-first // _HUGE) * _HUGE)
            for at in range(begin, filled - _HUGE + 1, _HUGE):
                if not _advise_at(libc, at, _HUGE, _COLLAPSE):
                    self._ends = True
                    return covered
                self._done[table.name] = at + _HUGE
                covered += _HUGE
        return covered


def _disjoint(found: list[Mapping]) -> list[Mapping]:
    """Those that hold a part of a file that no smaller one holds.

    A table that embeds and is the head too is mapped twice, and a token reads all of the head.
    """
    kept: list[Mapping] = []
    for m in sorted(found, key=lambda m: m.bytes):
        if not any(
            k.path == m.path and k.offset < m.offset + m.bytes and m.offset < k.offset + k.bytes
            for k in kept
        ):
            kept.append(m)
    return sorted(kept)


def _has_huge_pages() -> bool:
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        return "[never]" not in _ENABLED.read_text()
    except OSError:
        return False


def _advise(libc: ctypes.CDLL, m: Mapping, advice: int) -> bool:
    return _advise_at(libc, m.start, m.bytes, advice)


def _advise_at(libc: ctypes.CDLL, address: int, size: int, advice: int) -> bool:
    return bool(libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice) == 0)


def _map(libc: ctypes.CDLL, m: Mapping, access: int, flags: int, fd: int, offset: int) -> bool:
    """Map over `m`; what was there is gone at once."""
    libc.mmap.restype = ctypes.c_void_p
    found = libc.mmap(
        ctypes.c_void_p(m.start), ctypes.c_size_t(m.bytes), access, flags | _FIXED, fd,
        ctypes.c_long(offset),
    )  # fmt: skip
    return bool(found == m.start)


def _replace(libc: ctypes.CDLL, m: Mapping) -> bool:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if not _map(libc, m, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0):
        return False
    _advise(libc, m, mmap.MADV_HUGEPAGE)
    return True


def _fill(libc: ctypes.CDLL, m: Mapping) -> bool:
    """Read the file into the memory that took its place; map it again where that fails."""
    fd = os.open(m.path, os.O_RDONLY)
    try:
        memory = memoryview((ctypes.c_char * m.bytes).from_address(m.start)).cast("B")
        at, end = 0, min(m.bytes, os.fstat(fd).st_size - m.offset)
        while at < end:
            n = os.preadv(fd, [memory[at:end]], m.offset + at)
            if n <= 0:
                raise OSError("the file ended")
            at += n
    except OSError as e:
        log.warning("Weights stay in pages of their file: %s", e)
        _map(libc, m, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, m.offset)
        return False
    finally:
        os.close(fd)
    libc.mprotect(ctypes.c_void_p(m.start), ctypes.c_size_t(m.bytes), mmap.PROT_READ)
    return True
