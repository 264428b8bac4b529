"""The GGUF container, of one file or several: metadata, and tensors dequantised to f32 by rows.

The gguf package dequantises; its own reader is not used because it makes several array views for
every element of a metadata array, some 15 seconds for Gemma's vocabulary where one pass takes
half a second. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterable
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edge_kv.errors import WeightsError
from edge_kv.formats import Quantised
from edge_kv.weights import gguf_blocks
from edge_kv.weights.source import Array, Stored

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_MAX_PARTS = 1000
_MAGIC = b"GGUF"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)?", re.IGNORECASE | re.DOTALL)


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF by its name or, whatever its name, by its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as f:
            return f.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def model_names(names: Iterable[str]) -> list[str]:
    """The GGUF files among `names` that a model begins in: no later parts, no vision projectors."""
    found = [n for n in names if n.lower().endswith(".gguf") and "mmproj" not in n.lower()]
    return sorted(n for n in found if (part := _PART.fullmatch(n)) is None or int(part[2]) == 1)


def only_model(directory: Path) -> Path | None:
    """The one GGUF model in a directory without safetensors; None where there is none.

    Raises:
        WeightsError: several of them, or a directory that cannot be read.
    """
    try:
        names = os.listdir(directory)
    except OSError as e:
        raise WeightsError(f"{directory} cannot be read ({e.strerror}).") from e
    found = model_names(names)
    if not found or any(name.endswith(".safetensors") for name in names):
        return None
    if len(found) > 1:
        raise WeightsError(
            f"{directory} holds {len(found)} GGUF models ({', '.join(found[:5])}"
            f"{', …' if len(found) > 5 else ''}); give the path of the one you mean."
        )
    return directory / found[0]


def part_names(first: str) -> list[str]:
    """Every part of the model that begins in the file called `first`."""
    part = _PART.fullmatch(first)
    if part is None or int(part[2]) != 1:
        return [first]
    stem, count, suffix = part[1], min(int(part[3]), _MAX_PARTS), part[4] or ""
    return [f"{stem}-{n:05}-of-{part[3]}{suffix}" for n in range(1, count + 1)]


def open_gguf(path: Path) -> GGUFFile:
    """The model in `path`; when it is the first of several parts, with the tensors of all.

    Raises:
        WeightsError: see `GGUFFile`; also a later part, or parts that are missing or of another
            model.
    """
    first = GGUFFile(path)
    count = first.split("count", 1)
    if count <= 1:
        return first
    names = part_names(path.name)
    if first.split("no", 0) != 0:
        part = _PART.fullmatch(path.name)
        name = f"{part[1]}-00001-of-{part[3]}{part[4] or ''}" if part else "the first part"
        raise WeightsError(
            f"{path} is part {first.split('no', 0) + 1} of {count} of a model; give {name}, the "
            "others are found beside it."
        )
    if len(names) != count:
        raise WeightsError(
            f"{path} is the first of {count} parts, whose names must end in "
            f"-00001-of-{count:05}.gguf and so on for them to be found; rename them."
        )
    for number, name in enumerate(names[1:], 1):
        other = path.with_name(name)
        if not other.is_file():
            raise WeightsError(
                f"{path} is the first of {count} parts and {name} is not beside it; download it."
            )
        first.join(GGUFFile(other), number, count)
    total = first.split("tensors.count", len(first.tensors))
    if total != len(first.tensors):
        raise WeightsError(
            f"{path} and its parts hold {len(first.tensors)} tensors, expected {total}; "
            "the parts are of different models, download them again."
        )
    return first


class GGUFFile:
    """An opened GGUF file.

    Attributes:
        metadata: key -> number, bool, str, or list of them.
        tensors: every tensor under its own name, outermost axis first.
        files: the files that hold them.

    Raises:
        WeightsError: not GGUF, of another version, cut off, or a header that makes no sense: a
            key or a tensor that comes twice, tensors that overlap.
    """

    def __init__(self, path: Path):
        self._path = path
        self.files = [path]
        try:
            size = path.stat().st_size
            self._data = np.memmap(path, np.uint8, mode="r") if size else np.empty(0, np.uint8)
        except OSError as e:
            raise WeightsError(f"{path} cannot be read ({e.strerror}).") from e
        self._bytes = self._data.data
        self._at = 0
        self.metadata, infos = self._header()
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            self._damaged(f"its alignment is {alignment!r}")
        begin = -(-self._at // alignment) * alignment
        self._spans: list[tuple[int, int, str]] = []
        self.tensors = {
            name: self._tensor(name, shape, kind, begin + offset)
            for name, (shape, kind, offset) in infos.items()
        }
        for (_, end, name), (start, _, other) in pairwise(sorted(self._spans)):
            if start < end:
                self._damaged(f"{name!r} and {other!r} overlap")

    def split(self, key: str, default: int) -> int:
        """A whole number under `split.`: how the parts of a model say which they are."""
        value = self.metadata.get(f"split.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self._damaged(f"split.{key} is {value!r}")
        return value

    def join(self, part: GGUFFile, number: int, count: int) -> None:
        """Add the tensors of `part`, which has to be number `number` (from 0) of `count`."""
        if (part.split("no", count), part.split("count", 0)) != (number, count):
            raise WeightsError(
                f"{part._path} is not part {number + 1} of {count} of {self._path}; "
                "download the parts again."
            )
        twice = sorted(set(part.tensors) & set(self.tensors))
        if twice:
            raise WeightsError(
                f"{part._path} repeats {twice[0]!r} of another part; download the parts again."
            )
        self.tensors |= part.tensors
        self.files += part.files

    def _header(self) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]]]:
        if bytes(self._take(len(_MAGIC))) != _MAGIC:
            raise WeightsError(f"{self._path} is not a GGUF file: it does not begin with 'GGUF'.")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise WeightsError(
                f"{self._path} has GGUF version {version}; edge-kv reads little-endian versions "
                f"{' and '.join(map(str, _VERSIONS))}, convert it with a current llama.cpp."
            )
        n_tensors, n_keys = self._number("<Q"), self._number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string()
            if key in metadata:
                self._damaged(f"the key {key!r} comes twice")
            metadata[key] = self._value(self._number("<I"))
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(n_tensors):
            name = self._string()
            if name in infos:
                self._damaged(f"the tensor {name!r} comes twice")
            n_dims = self._number("<I")
            if n_dims > _MAX_DIMS:
                self._damaged(f"{name!r} has {n_dims} dimensions")
            # GGUF lists the innermost axis first.
            shape = tuple(reversed([self._number("<Q") for _ in range(n_dims)]))
            infos[name] = (shape, self._number("<I"), self._number("<Q"))
        return metadata, infos

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, at: int) -> Stored:
        storage = _storage(kind)
        if storage is None:
            return Stored(shape, _no_rows, f"stored as GGML type {kind}, which is not known")
        label, block, block_bytes, decode = storage
        if not shape or shape[-1] % block:
            self._damaged(f"{name!r} of shape {shape} cannot be stored as {label}")
        row = shape[-1] // block * block_bytes
        stride = prod(shape[1:-1]) * row
        end = at + prod(shape[:-1]) * row
        if end > self._data.size:
            raise WeightsError(
                f"{self._path} is cut off: {name!r} ends at byte {end}, the file has "
                f"{self._data.size}; download it again."
            )
        self._spans.append((at, end, name))
        if decode is None:
            return Stored(shape, _no_rows, f"stored as {label}, which gguf does not dequantise")

        def raw(start: int, stop: int) -> Any:
            return self._data[at + start * stride : at + stop * stride].reshape(-1, row)

        def rows(start: int, stop: int) -> Array:
            if len(shape) == 1:  # a vector is one row of blocks
                return np.array(decode(self._data[at:end])[start:stop], np.float32)
            values = np.array(decode(raw(start, stop)), np.float32)
            return values.reshape(stop - start, *shape[1:])

        def integers(start: int, stop: int) -> Quantised:
            return gguf_blocks.integers(label, raw(start, stop), block_bytes)

        exact = len(shape) > 1 and gguf_blocks.is_exact(label)
        return Stored(
            shape, rows, dtype=label, format=gguf_blocks.kept_as(label),
            integers=integers if exact else None,
        )  # fmt: skip

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            self._damaged(f"a metadata value has type {kind}")
        item, n = self._number("<I"), self._number("<Q")
        if item in _SCALARS:
            layout = _SCALARS[item]
            raw = self._take(n * struct.calcsize(layout))
            return np.frombuffer(raw, layout).tolist()
        if item != _STRING:  # arrays of arrays exist in the format, not in models
            self._damaged(f"a metadata array has items of type {item}")
        return self._strings(n)

    def _strings(self, n: int) -> list[str]:
        # Vocabularies have 262144 entries and their merges twice as many: no call for each.
        view, at, size = self._bytes, self._at, self._data.size
        unpack = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(n):
            if at + 8 > size:
                self._cut_off()
            begin = at + 8
            at = begin + unpack(view, at)[0]
            if at > size:
                self._cut_off()
            found.append(self._text(view[begin:at]))
        self._at = at
        return found

    def _string(self) -> str:
        return self._text(self._take(self._number("<Q")))

    def _text(self, raw: memoryview) -> str:
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            self._damaged(f"it holds text that is not UTF-8 ({bytes(raw[:20])!r})")

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _take(self, n: int) -> memoryview:
        begin, self._at = self._at, self._at + n
        if self._at > self._data.size:
            self._cut_off()
        return self._bytes[begin : self._at]

    def _cut_off(self) -> NoReturn:
        raise WeightsError(
            f"{self._path} is cut off: its header needs more than the {self._data.size} bytes "
            "there are; download it again."
        )

    def _damaged(self, what: str) -> NoReturn:
        raise WeightsError(f"{self._path} is damaged: {what}; download it again.")


_Storage = tuple[str, int, int, Callable[[Any], Any] | None]
_STORAGES: dict[int, _Storage | None] = {}


def _storage(kind: int) -> _Storage | None:
    """(name, values in a block, bytes of a block, decoder) of a GGML type; None: unknown."""
    if kind not in _STORAGES:
        _STORAGES[kind] = _find_storage(kind)
    return _STORAGES[kind]


def _find_storage(kind: int) -> _Storage | None:
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as e:
        raise WeightsError(
            "Reading GGUF needs the gguf package; in the checkout, run: pip install '.[export]'"
        ) from e
    try:
        qtype = GGMLQuantizationType(kind)
    except ValueError:
        return None
    block, block_bytes = GGML_QUANT_SIZES[qtype]

    def decode(raw: Any) -> Any:
        return dequantize(raw, qtype)

    if qtype == GGMLQuantizationType.F16:  # gguf views plain types only as their own dtype
        return qtype.name, block, block_bytes, lambda raw: raw.view("<f2")
    if qtype == GGMLQuantizationType.F32:
        return qtype.name, block, block_bytes, lambda raw: raw.view("<f4")
    try:
        decode(np.zeros((1, block_bytes), np.uint8))
    except NotImplementedError:
        return qtype.name, block, block_bytes, None
    return qtype.name, block, block_bytes, decode


def _no_rows(start: int, stop: int) -> Array:
    raise WeightsError("This tensor's storage type cannot be read.")
