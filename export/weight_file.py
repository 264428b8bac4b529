"""Streams a checkpoint into the artifact's weight file and PLE file, one block of rows at a time.

The layout is fixed before the first byte is read, each finished tensor is noted in a journal, and
every write lands at its own offset: a killed export continues after the last finished tensor and
ends byte-identical to an uninterrupted one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from edge_kv.errors import ExportError
from edge_kv.export.rounding import Factor, round_rows
from edge_kv.files import write_text
from edge_kv.formats import FORMATS, GROUP, Format, Quantised, dequantise, pack, unpack
from edge_kv.manifest import PleEntry, TensorReport
from edge_kv.models.model import PLE_TABLE, TABLE, TokenRows
from edge_kv.progress import Progress
from edge_kv.tensors import PLE_BLOCK, ple_bits, stored_format, stored_shape

PAGE = 4096
ROW_BLOCK_BYTES = 64 << 20  # f32 bytes of rows held at a time
NUMPY: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32), "u8": np.dtype(np.uint8), "i64": np.dtype(np.int64)
}  # fmt: skip


@dataclass(frozen=True)
class Region:
    """One stored array in the weight file: dtype f32, u8 or i64, row-major, page-aligned."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * NUMPY[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.row_bytes


class Spec(Protocol):
    """What a layout needs to know of a tensor: its name, shape and treatment."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def kind(self) -> str: ...
    @property
    def elements(self) -> int: ...


class Source(Protocol):
    """Where the values of tensors come from."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        """Rows start … stop-1 of the tensor `name`, as a float32 array."""


@dataclass(frozen=True)
class StoredTensor:
    """How one tensor is kept: in a weight format, or as it is."""

    spec: Spec
    format: Format | None


@runtime_checkable
class PackedSource(Protocol):
    """A source that may hold matrices as the file is to store them."""

    def is_exact(self, name: str) -> bool:
        """Whether what `packed` and `integers` yield are the very values that `read` does."""

    def integers(self, name: str, fmt: Format, start: int, stop: int) -> Quantised | None:
        """Rows start … stop-1 of a matrix in the integers of `fmt`, if the source has them."""

    def packed(self, name: str, fmt: Format, start: int, stop: int) -> np.ndarray[Any, Any] | None:
        """Rows start … stop-1 of a tensor, from a whole group on, as `fmt` stores them; of a stack
        these matrices. None: the source has them in another form, `read` them."""


class WeightLayout:
    """Where every tensor of a model lies in the weight file, for one quantisation.

    `specs` are the model's tensors in the order in which a forward pass meets them; `formats` names
    the weight format of each kind of tensor, and of single ones that are kept otherwise. `steps`
    are those of linears whose activations are rounded: name -> (input, output), 0 for none.
    """

    calibrates = True  # whether others may round rows: calibration, a source that has them packed

    def __init__(self, specs: Iterable[Spec], formats: Mapping[str, str]):
        self.formats = dict(formats)
        self.steps: dict[str, tuple[float, float]] = {}
        self.tensors = [self.stored(spec) for spec in specs if spec.kind != PLE_TABLE]
        self.by_name = {t.spec.name: t for t in self.tensors}
        self.regions: dict[str, Region] = {}
        at = 0
        for t in self.tensors:
            region = _region(t, at)
            self.regions[region.name] = region
            at += -(-region.bytes // PAGE) * PAGE
        self.bytes = at

    def stored(self, spec: Spec) -> StoredTensor:
        """How one tensor is kept."""
        return StoredTensor(spec, stored_format(spec, self.formats))

    def region(self, t: StoredTensor) -> Region:
        """Where a tensor lies."""
        return self.regions[_region(t, 0).name]

    def quantise(
        self, rows: Tensor, fmt: Format, factors: Sequence[Factor] | None = None
    ) -> tuple[Quantised, float]:
        """Rows in integers and scales, and the squared error (see `rounding.round_rows`)."""
        return round_rows(rows, fmt, factors)


def _region(t: StoredTensor, offset: int) -> Region:
    if t.format is None:
        return Region(t.spec.name, "i64" if t.spec.kind == TABLE else "f32", t.spec.shape, offset)
    name = f"{t.spec.name.removesuffix('.weight')}.packed"
    return Region(name, "u8", stored_shape(t.format, t.spec.shape), offset)


class Journal:
    """One JSON line for every finished tensor; a torn last line is ignored and redone."""

    def __init__(self, path: Path):
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    self.done[entry["name"]] = entry
                except (ValueError, KeyError, TypeError):
                    break
            self._rewrite()

    def _rewrite(self) -> None:
        write_text(self.path, "".join(json.dumps(e) + "\n" for e in self.done.values()))

    def belongs_to(self, file: Path, size: int, prefix: str = "") -> None:
        """Forget the entries that begin with `prefix` unless the file they tell of is whole."""
        if not (file.is_file() and file.stat().st_size == size):
            self.done = {n: e for n, e in self.done.items() if not n.startswith(prefix)}
            self._rewrite()

    def has(self, name: str, *numbers: str) -> bool:
        """Whether `name` is finished, and its entry holds what it should."""
        entry = self.done.get(name, {})
        return name in self.done and all(
            isinstance(entry.get(n), (int, float)) and isfinite(entry[n]) for n in numbers
        )

    def add(self, name: str, **entry: Any) -> None:
        self.done[name] = {"name": name, **entry}
        with self.path.open("a") as f:
            f.write(json.dumps(self.done[name]) + "\n")
            f.flush()
            os.fsync(f.fileno())


def write_weights(
    source: Source,
    layout: WeightLayout,
    path: Path,
    journal: Journal,
    progress: Progress,
    leave: Set[str] = frozenset(),
) -> dict[str, TensorReport]:
    """Write every tensor of `source` into `path`, but for those that are left to calibration.

    Returns the error of each quantised one.

    Raises:
        WeightsError: a tensor that is not finite or cannot be read.
        ExportError: the disk is full.
    """
    tensors = [t for t in layout.tensors if t.spec.name not in leave]
    total = sum(t.spec.elements for t in tensors) * 4
    done = 0
    journal.belongs_to(path, layout.bytes)
    with sized_file(path, layout.bytes) as fd:
        for t in tensors:
            name = t.spec.name
            if not journal.has(name, "error"):
                error = _write_tensor(source, t, layout, fd)
                os.fsync(fd)
                journal.add(name, error=error)
            done += t.spec.elements * 4
            progress.advance(name, done, total)
    return weight_reports(layout, journal)


def weight_reports(layout: WeightLayout, journal: Journal) -> dict[str, TensorReport]:
    """The format and the error of every quantised tensor that is written."""
    return {
        t.spec.name: TensorReport(format=t.format.name, error=journal.done[t.spec.name]["error"])
        for t in layout.tensors
        if t.format and journal.has(t.spec.name, "error")
    }


def _write_tensor(source: Source, t: StoredTensor, layout: WeightLayout, fd: int) -> float:
    """Stream one tensor; returns ||w - q(w)|| / ||w||."""
    lost = size = 0.0
    rows = row_step(t.spec.shape[1:])
    region = layout.region(t)
    packs = source if t.format and layout.calibrates and isinstance(source, PackedSource) else None
    for start in range(0, t.spec.shape[0], rows):
        stop = min(start + rows, t.spec.shape[0])
        at = start // GROUP if len(t.spec.shape) == 2 else start
        if packs and t.format and (
            packed := packs.packed(t.spec.name, t.format, start, stop)
        ) is not None:  # fmt: skip
            _put(fd, region, at, packed)
            if not packs.is_exact(t.spec.name):
                error, whole = _difference(t, packed, source.read(t.spec.name, start, stop))
                lost, size = lost + error, size + whole
            continue
        values = torch.from_numpy(source.read(t.spec.name, start, stop))
        if t.format is None:
            whole_numbers = region.dtype == "i64"
            _put(fd, region, start, (values.long() if whole_numbers else values).numpy())
            continue
        size += float(values.square().sum(dtype=torch.float64))
        for i, matrix in enumerate(values[None] if values.ndim == 2 else values):
            quantised, error = layout.quantise(matrix, t.format)
            lost += error
            put_rows(fd, region, at + i, t.format, quantised)
    return round((lost / size) ** 0.5, 7) if size else 0.0


def _difference(
    t: StoredTensor, packed: np.ndarray[Any, Any], values: np.ndarray[Any, Any]
) -> tuple[float, float]:
    """sum((w - q)^2) and sum(w^2) of rows or matrices `values` that are stored as `packed`."""
    assert t.format
    lost = 0.0
    stacked = values.ndim == 3
    for own, matrix in zip(packed if stacked else [packed], values if stacked else [values],
                           strict=True):  # fmt: skip
        stored = dequantise(t.format, unpack(t.format, own, *matrix.shape))
        lost += float(np.square(matrix - stored, dtype=np.float64).sum())
    return lost, float(np.square(values, dtype=np.float64).sum())


def row_step(shape: Sequence[int]) -> int:
    """Rows of `shape` that are held in memory at a time: whole groups, or one at least."""
    rows = ROW_BLOCK_BYTES // (4 * max(1, prod(shape)))
    return -(-rows // GROUP) * GROUP if len(shape) == 1 else max(1, rows)


def put_rows(fd: int, region: Region, start: int, fmt: Format, q: Quantised) -> None:
    """Pack rounded rows and write them from group (of a stack: matrix) `start` of a region on."""
    _put(fd, region, start, pack(fmt, q))


def _put(fd: int, region: Region, start: int, values: np.ndarray[Any, Any]) -> None:
    data = np.ascontiguousarray(values).data.cast("B")
    _write_at(fd, data, region.offset + start * region.row_bytes)


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    try:
        while data:
            written = os.pwrite(fd, data, offset)
            data, offset = data[written:], offset + written
    except OSError as e:
        raise ExportError(
            f"Writing the weights failed ({e.strerror}); free some disk space and run the same "
            "command again: it continues where it stopped."
        ) from e


class sized_file:
    """Opens a file for positioned writes at its full length, keeping what it already holds."""

    def __init__(self, path: Path, size: int):
        self.path, self.size = path, size

    def __enter__(self) -> int:
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self.fd, self.size)
        return self.fd

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)


def ple_layout(
    rows: TokenRows | None, vocab: int, formats: Mapping[str, str], file: str = "ple.bin"
) -> PleEntry | None:
    """The PLE file's layout under `formats`; None for a model without per-layer embeddings."""
    if rows is None:
        return None
    bits = ple_bits(formats) if rows.dim % PLE_BLOCK == 0 else 32
    return PleEntry(
        file=file,
        rows=vocab,
        n_layers=rows.layers,
        dim=rows.dim,
        bits=bits,
        block=PLE_BLOCK if bits < 32 else 0,
    )


def write_ple(
    source: Source, name: str, entry: PleEntry, path: Path, journal: Journal,
    progress: Progress,
) -> float:  # fmt: skip
    """Stream the per-layer table `name` into its row file; returns the relative error."""
    rows = max(1, ROW_BLOCK_BYTES // (4 * entry.values))
    journal.belongs_to(path, entry.rows * entry.row_bytes, f"{name}[")
    with sized_file(path, entry.rows * entry.row_bytes) as fd:
        for start in range(0, entry.rows, rows):
            stop = min(start + rows, entry.rows)
            key = f"{name}[{start}:{stop}]"
            if not journal.has(key, "lost", "size"):
                data, lost, size = _ple_rows(source, name, entry, start, stop)
                _write_at(fd, data.data.cast("B"), start * entry.row_bytes)
                os.fsync(fd)
                journal.add(key, lost=lost, size=size)
            progress.advance(name, stop * entry.values * 4, entry.rows * entry.values * 4)
    parts = [e for k, e in journal.done.items() if k.startswith(f"{name}[")]
    total = sum(e["size"] for e in parts)
    return round((sum(e["lost"] for e in parts) / total) ** 0.5, 7) if total else 0.0


def _ple_rows(
    source: Source, name: str, entry: PleEntry, start: int, stop: int
) -> tuple[np.ndarray[Any, Any], float, float]:
    """Rows start … stop-1 as they are stored, the squared error and the sum of squares."""
    q = None
    if entry.bits < 32 and isinstance(source, PackedSource):
        q = source.integers(name, entry_format(entry), start, stop)
        if q is not None and source.is_exact(name):
            return _ple_bytes(entry, q), 0.0, 0.0
    values = torch.from_numpy(source.read(name, start, stop))
    size = float(values.square().sum(dtype=torch.float64))
    if q is None:
        return *encode_ple(values, entry), size
    stored = torch.from_numpy(dequantise(entry_format(entry), q))
    lost = (values - stored).square().sum(dtype=torch.float64)
    return _ple_bytes(entry, q), float(lost), size


def entry_format(entry: PleEntry) -> Format:
    """The weight format whose integers and scales the rows of `entry` are."""
    return FORMATS[f"int{entry.bits}-f16"]


def encode_ple(values: Tensor, entry: PleEntry) -> tuple[np.ndarray[Any, Any], float]:
    """PLE rows [n, values] f32 -> bytes [n, row_bytes] and the squared error."""
    if entry.bits == 32:
        return np.ascontiguousarray(values.numpy()).view(np.uint8), 0.0
    q, lost = round_rows(values, entry_format(entry))
    return _ple_bytes(entry, q), lost


def _ple_bytes(entry: PleEntry, q: Quantised) -> np.ndarray[Any, Any]:
    assert q.block_scales is not None
    data: np.ndarray[Any, Any] = q.codes.view(np.uint8)
    if entry.bits == 4:
        stored = data + np.uint8(8)
        data = stored[:, 0::2] | stored[:, 1::2] << 4
    scales = np.ascontiguousarray(q.block_scales)
    return np.concatenate([data, scales.view(np.uint8)], 1)


class StoredWeights:
    """Reads regions of a finished weight file as tensors, without keeping them resident."""

    def __init__(self, layout: WeightLayout, path: Path):
        self.layout, self.path = layout, path

    def read(self, region: str, start: int, stop: int) -> Tensor:
        """Rows start … stop-1 of a region (`binding.ReadRows`)."""
        r = self.layout.regions[region]
        with self.path.open("rb") as f:
            f.seek(r.offset + start * r.row_bytes)
            data = f.read((stop - start) * r.row_bytes)
        values = np.frombuffer(bytearray(data), NUMPY[r.dtype])
        return torch.from_numpy(values).view(stop - start, *r.shape[1:])
