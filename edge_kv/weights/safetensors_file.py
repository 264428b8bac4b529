"""Row ranges of a safetensors file as f32, memory-mapped and without torch.

The safetensors package reads bf16, the type Gemma is published in, only through torch: numpy has
no such type. The format is a JSON header and raw little-endian data, so the header is read here
and bf16 is widened by hand (it is the upper half of an f32).
"""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_kv.errors import WeightsError
from edge_kv.weights.source import Array, Stored

_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "F8_E8M0": 1,
}  # fmt: skip
_STORAGE = {
    "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E8M0": "u1",
}  # fmt: skip
# Whole numbers are not weights; a reader that knows what they mean may still have them.
_WHOLE = {"I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1"}
_MAX_HEADER = 100_000_000  # the format's own limit


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file by name; data is mapped, nothing is read yet.

    Raises:
        WeightsError: not a safetensors file, cut off, or a header that points outside the file.
    """
    header, begin, size = _read_header(path)
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, mode="r")
    stored = {n: _stored(path, data, n, entry, begin, size) for n, entry in header.items()}
    spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    for (_, end, name), (start, _, other) in pairwise([(0, 0, "the header"), *spans]):
        if start < end:
            raise WeightsError(
                f"{path} is damaged: {name!r} and {other!r} overlap; download it again."
            )
        if start > end:
            raise WeightsError(
                f"{path} is damaged: {start - end} bytes between {name!r} and {other!r} are of no "
                "tensor; download it again."
            )
    if (rest := size - begin - max((end for _, end, _ in spans), default=0)) > 0:
        raise WeightsError(
            f"{path} is damaged: {rest} bytes at its end are of no tensor; download it again."
        )
    return stored


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header, offset of the data, file size)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise WeightsError(
                    f"{path} is cut off or not a safetensors file: its header needs {length} "
                    f"bytes, the file has {size}; download it again."
                )
            text = f.read(length)
    except OSError as e:
        raise WeightsError(f"{path} cannot be read ({e.strerror}).") from e
    try:
        header = json.loads(str(text, "utf-8"), object_pairs_hook=partial(_distinct, path))
    except (ValueError, RecursionError) as e:
        raise WeightsError(
            f"{path} has a header that is not JSON ({e}); it is damaged, download it again."
        ) from e
    if not isinstance(header, dict):
        raise WeightsError(f"{path} has a header that is not a JSON object; download it again.")
    return header, 8 + length, size


def _distinct(path: Path, entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, no key of which comes twice."""
    found: dict[str, Any] = {}
    for key, value in entries:
        if key in found:
            raise WeightsError(f"{path} describes {key!r} twice; it is damaged, download it again.")
        found[key] = value
    return found


def _stored(
    path: Path, data: NDArray[np.uint8], name: str, entry: Any, begin: int, size: int
) -> Stored:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        sound = isinstance(dtype, str) and all(
            type(i) is int and i >= 0 for i in (*shape, first, last)
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound or first > last:
        raise WeightsError(f"{path} describes {name!r} wrongly; it is damaged, download it again.")
    if begin + last > size:
        raise WeightsError(
            f"{path} is cut off: {name!r} ends at byte {begin + last}, the file has {size}; "
            "download it again."
        )
    if dtype in _BYTES and last - first != prod(shape) * _BYTES[dtype]:
        raise WeightsError(
            f"{path} gives {name!r} {last - first} bytes, its shape {shape} in {dtype} needs "
            f"{prod(shape) * _BYTES[dtype]}; the file is damaged, download it again."
        )
    storage = {**_STORAGE, **_WHOLE}
    fault = "" if dtype in _STORAGE else f"stored as {dtype}; F32, F16 and BF16 can be read"

    def raw(start: int, stop: int) -> NDArray[Any]:
        stride = prod(shape[1:]) * _BYTES[dtype]
        at = begin + first
        held = data[at + start * stride : at + stop * stride].view(storage[dtype])
        return held.reshape(stop - start, *shape[1:])

    def rows(start: int, stop: int) -> Array:
        return _widen(raw(start, stop), dtype)

    return Stored(shape, rows, fault, dtype, raw=raw if dtype in _WHOLE else None)


def _e4m3() -> Array:
    """All 256 numbers of 4 exponent and 3 mantissa bits, bias 7, without infinities."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(
        exponent, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9)
    )
    value[code & 127 == 127] = np.nan
    signed: Array = np.where(code & 128, -value, value).astype(np.float32)
    return signed


_E4M3 = _e4m3()
# Powers of two from 2^-127 to 2^127, then NaN.
_E8M0 = np.append(np.ldexp(1.0, np.arange(-127, 128)), np.nan).astype(np.float32)


def _widen(raw: NDArray[Any], dtype: str) -> Array:
    """A fresh f32 array of stored values."""
    if dtype == "F8_E4M3":
        out: Array = _E4M3[raw]
    elif dtype == "F8_E8M0":
        out = _E8M0[raw]
    elif dtype == "BF16":
        wide = raw.astype(np.uint32)
        wide <<= 16
        out = wide.view(np.float32)
    else:
        out = raw.astype(np.float32)
    return out
