"""Floats that are integers in disguise: checkpoints trained for 4 bits and published in bf16.

Blocks of 32 values that were integers -8 … 7 times one half are found by their ratios. Rounding
their products to bf16 leaves an interval for each block's scale; a half in it, the integers and
that rounding give the very values of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import numpy as np

from edge_kv.errors import WeightsError
from edge_kv.formats import BLOCK, FORMATS, Array, Quantised, dequantise
from edge_kv.weights.source import Stored

_FORMAT = FORMATS["int4-f16"]
_TYPES = {"BF16": 8, "F16": 11}  # significant bits of a value
_SAMPLE = 16  # rows that are looked at before a whole matrix is
_VALUES = 1 << 22  # looked at together
_MOSTLY = 0.5  # of a checkpoint's values: with fewer on grids, it is a float one


def on_grids(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The same tensors; matrices of 4-bit integers say so, if most of the values are theirs."""
    wide = {n: t for n, t in stored.items() if len(t.shape) == 2 and not t.shape[1] % BLOCK}
    likely = {n: t for n, t in wide.items() if _is_on_grid(t, min(_SAMPLE, t.shape[0]))}
    least = _MOSTLY * sum(prod(t.shape) for t in wide.values())

    def few(found: Mapping[str, Stored]) -> bool:
        return not found or sum(prod(t.shape) for t in found.values()) < least

    if few(likely):
        return dict(stored)
    found = {n: t for n, t in likely.items() if _is_on_grid(t, t.shape[0])}
    if few(found):
        return dict(stored)
    return {**stored, **{name: _integral(name, tensor) for name, tensor in found.items()}}


def _is_on_grid(tensor: Stored, rows: int) -> bool:
    if tensor.fault or tensor.dtype not in _TYPES:
        return False
    step = max(1, _VALUES // tensor.shape[1])
    return all(
        _integers(tensor.rows(i, min(i + step, rows)), _TYPES[tensor.dtype]) is not None
        for i in range(0, rows, step)
    )


def _integral(name: str, tensor: Stored) -> Stored:
    def integers(start: int, stop: int) -> Quantised:
        found = _integers(tensor.rows(start, stop), _TYPES[tensor.dtype])
        if found is None:
            raise WeightsError(f"{name} was changed while it was read; start again.")
        return found

    def rows(start: int, stop: int) -> Array:
        return dequantise(_FORMAT, integers(start, stop))

    return replace(tensor, rows=rows, format=_FORMAT.name, integers=integers)


def _integers(rows: Array, bits: int) -> Quantised | None:
    """Codes and scales of `rows`, whose values have `bits`; None where a block lies on no grid."""
    blocks = rows.reshape(-1, BLOCK)
    top = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    codes = np.zeros(blocks.shape, np.int8)
    scales = np.zeros((len(blocks), 1), np.float16)
    open_ = np.flatnonzero(top[:, 0])
    for outermost in range(1, -_FORMAT.low + 1):  # the code of the largest value, if it is negative
        if not len(open_):
            break
        values = blocks[open_]
        scale = top[open_] / np.float32(-outermost)
        found = np.rint(values / scale)
        away, size = np.abs(found), np.abs(values)
        fraction, exponent = np.frexp(size)
        above = np.ldexp(np.float32(1), exponent - 1 - bits)  # half of a value's last digit
        below = np.where(fraction == 0.5, above / 2, above)
        with np.errstate(divide="ignore", invalid="ignore"):
            low = np.where(away > 0, (size - below) / away, 0).max(1, keepdims=True)
            high = np.where(away > 0, (size + above) / away, np.inf).min(1, keepdims=True)
            middle = ((low + high) / 2).astype(np.float16)
        sound = (low <= middle) & (middle <= high) & (found.max(1, keepdims=True) <= _FORMAT.high)
        sound &= ((away > 0) | (size == 0)).all(1, keepdims=True)
        hit = sound[:, 0]
        codes[open_[hit]] = found[hit]
        scales[open_[hit]] = middle[hit] * np.sign(scale[hit])
        open_ = open_[~hit]
    if len(open_):
        return None
    return Quantised(codes.reshape(rows.shape), scales.reshape(len(rows), -1), None)
