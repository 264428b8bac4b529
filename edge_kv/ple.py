"""PLE rows: the per-layer embedding table, read row by row from its file and never resident."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_kv.errors import ArtifactError
from edge_kv.manifest import PleEntry

_BITS = (4, 8, 32)


class PleTable:
    """The open PLE file of an artifact; format in `manifest.PleEntry`."""

    def __init__(self, path: Path, entry: PleEntry) -> None:
        """Open `path` and check that it holds `entry.rows` rows.

        Raises:
            ArtifactError: missing, cut off, or stored in a way this version does not read.
        """
        self._path = path
        self._entry = entry
        self._file = -1
        quantised = entry.bits != 32
        if entry.bits not in _BITS or (
            quantised and (entry.block <= 0 or entry.values % entry.block)
        ):
            raise ArtifactError(
                f"{path} is said to store {entry.bits} bits in blocks of {entry.block}, which "
                "this edge-kv does not read; export again."
            )
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            size = os.fstat(self._file).st_size
        except OSError as e:
            raise ArtifactError(f"Cannot open {path}: {e.strerror}.") from e
        if size < entry.rows * entry.row_bytes:
            self.close()
            raise ArtifactError(
                f"{path} has {size} bytes, {entry.rows} rows need {entry.rows * entry.row_bytes}; "
                "it is cut off; copy or export the artifact again."
            )
        if hasattr(os, "posix_fadvise"):  # rows are scattered: reading ahead would fill the cache
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def rows(self, ids: npt.NDArray[np.int64], layers: int) -> npt.NDArray[np.float32]:
        """Rows of `ids` (int64 [n]) for the first `layers` layers: float32 [n, layers, dim].

        Raises:
            ArtifactError: the file ends before a row does.
        """
        entry = self._entry
        unique, where = np.unique(ids, return_inverse=True)
        raw = np.empty((len(unique), entry.row_bytes), np.uint8)
        for row, token in zip(raw, unique.tolist(), strict=True):
            data = _read_at(self._file, entry.row_bytes, token * entry.row_bytes)
            if len(data) != entry.row_bytes:
                raise ArtifactError(
                    f"{self._path} ends inside the row of token {token}; it is cut off; "
                    "copy or export the artifact again."
                )
            row[:] = np.frombuffer(data, np.uint8)
        values = _dequantise(raw, entry, layers * entry.dim)
        return values[where].reshape(len(ids), layers, entry.dim)

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _read_at(file: int, count: int, at: int) -> bytes:
    """Up to `count` bytes from offset `at` of an open file."""
    if hasattr(os, "pread"):
        return os.pread(file, count, at)
    os.lseek(file, at, os.SEEK_SET)  # Windows: one session reads at a time
    return os.read(file, count)


def _dequantise(raw: npt.NDArray[np.uint8], entry: PleEntry, count: int) -> npt.NDArray[np.float32]:
    """First `count` values of every stored row: [n, row_bytes] -> float32 [n, count]."""
    if entry.bits == 32:
        return raw.view("<f4")[:, :count].astype(np.float32)
    blocks = -(-count // entry.block)
    scales = raw[:, entry.data_bytes :].copy().view("<f2")[:, :blocks].astype(np.float32)
    width = blocks * entry.block
    if entry.bits == 4:
        data = raw[:, : width // 2]
        values = np.empty((len(raw), width), np.float32)
        values[:, 0::2] = data & 15
        values[:, 1::2] = data >> 4
        values -= 8.0
    else:
        values = raw[:, :width].view(np.int8).astype(np.float32)
    scaled = values.reshape(len(raw), blocks, entry.block)
    scaled *= scales[:, :, None]
    return scaled.reshape(len(raw), width)[:, :count]
