"""Weights in huge pages: a token reads all of them, and 4 KB pages cost a tenth to a fifth of that.

Where a kernel can turn pages of a mapped file into huge ones, it is asked to, and they stay pages
that the system may drop. Elsewhere the weights are copied into anonymous memory at the addresses
where the file was mapped, so that whoever reads them need not know. Such a copy cannot be dropped:
it is made where memory is ample and somebody asked for it, by `load(…, huge_pages=True)`, which is
`--huge-pages` of the commands.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from edge_kv.runtime.available import available_memory
from edge_kv.runtime.mapped import Mapping, Span, mappings

log = logging.getLogger(__name__)
RESERVE = 256 << 20  # bytes that stay available beside a copy
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FIXED, _COLLAPSE = 0x10, 25  # MAP_FIXED and MADV_COLLAPSE of Linux, which Python does not name


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
    address, size = ctypes.c_void_p(m.start), ctypes.c_size_t(m.bytes)
    return bool(libc.madvise(address, size, advice) == 0)


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
