"""How quantised matrices are stored: the formats, their bytes, and packing in numpy.

A matrix [rows, cols] is symmetric integers with scales. A block is 32 consecutive values of a row:

    value = code * block scale * row scale

where a format may leave out one of the scales, and where a code of a `levels` format is an index
into 16 levels. The stored form is the one that every kernel reads, on every CPU:

    rows     16 rows form a group (the last one is filled up with zeros); groups follow each other
    line     64 bytes: four of each of the 16 rows, or a scale for each of them
    group    a line of row scales (f32), if the format has them; then, again and again, a line of
             block scales and the lines of values it belongs to: 4 blocks of 8-bit scales, 2 of f16
    value    stored as code + 2^(bits-1). Four bytes hold 32/bits consecutive values of a row: value
             4p+b lies in byte b, from bit p*bits on

so that a kernel reads one stream of whole cache lines, and activations keep their natural order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_kv.errors import ConfigError, did_you_mean

Array = npt.NDArray[Any]

BLOCK = 32  # values of a row that share a scale
GROUP = 16  # rows that are stored together
LINE = 64  # bytes

# Lloyd-Max levels for blocks of 32 normal values, each block scaled so that its value of largest
# magnitude is at the lower end, and stretched to the range of a byte.
LEVELS = (-127, -102, -82, -65, -50, -36, -22, -9, 3, 16, 29, 43, 57, 73, 92, 115)

_SCALES: dict[str, np.dtype[Any]] = {"s8": np.dtype(np.int8), "f16": np.dtype(np.float16)}


@dataclass(frozen=True)
class Format:
    """One way to store a matrix.

    `scale` says what scales a value: "f16" a half for each block; "s8" a signed byte for each
    block times a float for each row; "row" that float alone. With `levels`, codes are indices.
    """

    name: str
    bits: int
    scale: str
    levels: tuple[int, ...] = ()

    @property
    def low(self) -> int:
        """The smallest code."""
        return 0 if self.levels else -(1 << self.bits - 1)

    @property
    def high(self) -> int:
        """The largest code."""
        return self.low + (1 << self.bits) - 1

    @property
    def has_row_scales(self) -> bool:
        return self.scale != "f16"

    @property
    def block_scale(self) -> np.dtype[Any] | None:
        """The type of a block's scale; None where a row has but one."""
        return _SCALES.get(self.scale)

    @property
    def served(self) -> int:
        """Blocks whose scales fill a line; 0 without such scales."""
        scale = self.block_scale
        return 0 if scale is None else LINE // (GROUP * int(scale.itemsize))

    def blocks(self, cols: int) -> int:
        """Blocks of a row; the last one is filled up with zeros."""
        return -(-cols // BLOCK)

    def shape(self, rows: int, cols: int) -> tuple[int, int]:
        """(groups, bytes of a group) of the stored array, which is uint8."""
        blocks = self.blocks(cols)
        lines = int(self.has_row_scales) + blocks * self.bits
        lines += -(-blocks // self.served) if self.served else 0
        return -(-rows // GROUP), lines * LINE

    def bytes(self, rows: int, cols: int) -> int:
        """Bytes of a stored matrix."""
        groups, stride = self.shape(rows, cols)
        return groups * stride

    def bits_per_weight(self, rows: int, cols: int) -> float:
        """All bytes of a stored matrix, scales and filling included, in bits a value."""
        return 8 * self.bytes(rows, cols) / (rows * cols)


FORMATS = {
    f.name: f
    for f in (
        Format("int4-s8", 4, "s8"),
        Format("int4-f16", 4, "f16"),
        Format("code4-s8", 4, "s8", LEVELS),
        Format("code4-f16", 4, "f16", LEVELS),
        Format("int8-s8", 8, "s8"),
        Format("int8-f16", 8, "f16"),
        Format("int2-row", 2, "row"),
        Format("int4-row", 4, "row"),
        Format("int8-row", 8, "row"),
    )
}


def find_format(name: str) -> Format:
    """The format called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in FORMATS:
        raise ConfigError(f"Unknown weight format {name!r}.{did_you_mean(name, tuple(FORMATS))}")
    return FORMATS[name]


@dataclass(frozen=True)
class Quantised:
    """A matrix [rows, cols] as integers and scales.

    `codes` is int8 [rows, cols]; `block_scales` is int8 or float16 [rows, blocks], or None;
    `row_scales` is float32 [rows], or None.
    """

    codes: Array
    block_scales: Array | None
    row_scales: Array | None


def pack(fmt: Format, q: Quantised) -> Array:
    """`q` as it is stored: uint8 [groups, bytes of a group]."""
    rows, cols = q.codes.shape
    groups, stride = fmt.shape(rows, cols)
    values, scales = value_lines(fmt, cols)
    out = np.zeros((groups, stride // LINE, LINE), np.uint8)
    stored = np.zeros((groups * GROUP, fmt.blocks(cols) * BLOCK), np.uint8)
    stored[:rows, :cols] = q.codes - np.int8(fmt.low)  # wraps around: 8-bit codes become 0 … 255
    parts = stored.reshape(groups, GROUP, len(values), 8 // fmt.bits, 4)
    words = np.zeros(parts.shape[:3] + parts.shape[4:], np.uint8)
    for p in range(8 // fmt.bits):
        words |= parts[:, :, :, p] << p * fmt.bits
    out[:, values] = words.transpose(0, 2, 1, 3).reshape(groups, len(values), LINE)
    if fmt.has_row_scales:
        assert q.row_scales is not None
        by_row = np.zeros(groups * GROUP, np.float32)
        by_row[:rows] = q.row_scales
        out[:, 0] = by_row.reshape(groups, GROUP).view(np.uint8)
    if fmt.block_scale is not None:
        assert q.block_scales is not None and q.block_scales.dtype == fmt.block_scale
        filled = np.zeros((groups * GROUP, len(scales) * fmt.served), fmt.block_scale)
        filled[:rows, : fmt.blocks(cols)] = q.block_scales
        by_block = filled.reshape(groups, GROUP, -1).transpose(0, 2, 1)
        out[:, scales] = np.ascontiguousarray(by_block).view(np.uint8).reshape(groups, -1, LINE)
    return out.reshape(groups, stride)


def unpack(fmt: Format, packed: Array, rows: int, cols: int) -> Quantised:
    """The integers and scales of a stored matrix [rows, cols]."""
    values, scales = value_lines(fmt, cols)
    lines = packed.reshape(len(packed), -1, LINE)
    words = lines[:, values].reshape(len(packed), -1, GROUP, 4).transpose(0, 2, 1, 3)
    shifts = np.arange(0, 8, fmt.bits, dtype=np.uint8)[:, None]
    stored = words[:, :, :, None] >> shifts & np.uint8(2**fmt.bits - 1)
    codes = stored.reshape(len(packed) * GROUP, -1)[:rows, :cols] + np.int8(fmt.low).view(np.uint8)
    row_scales = block_scales = None
    if fmt.has_row_scales:
        row_scales = np.ascontiguousarray(lines[:, 0]).view(np.float32).reshape(-1)[:rows]
    if fmt.block_scale is not None:
        by_block = np.ascontiguousarray(lines[:, scales]).view(fmt.block_scale)
        by_row = by_block.reshape(len(packed), -1, GROUP).transpose(0, 2, 1)
        block_scales = by_row.reshape(len(packed) * GROUP, -1)[:rows, : fmt.blocks(cols)]
    return Quantised(codes.view(np.int8), block_scales, row_scales)


def dequantise(fmt: Format, q: Quantised) -> Array:
    """The values of `q`: float32 [rows, cols]."""
    rows, cols = q.codes.shape
    codes = np.array(fmt.levels, np.float32)[q.codes] if fmt.levels else q.codes.astype(np.float32)
    scales = np.ones((rows, 1), np.float32)
    if q.block_scales is not None:
        scales = np.repeat(q.block_scales.astype(np.float32), BLOCK, 1)[:, :cols]
    if q.row_scales is not None:
        scales = scales * q.row_scales[:, None]
    return codes * scales


def value_lines(fmt: Format, cols: int) -> tuple[Array, Array]:
    """Which lines of a group hold values, in order, and which hold block scales."""
    head, blocks = int(fmt.has_row_scales), fmt.blocks(cols)
    value = np.arange(blocks * fmt.bits)
    if not fmt.served:
        return head + value, np.empty(0, int)
    lines = fmt.served * fmt.bits  # of values that a line of scales serves
    scales = np.arange(-(-blocks // fmt.served)) * (lines + 1)
    return head + 1 + value + value // lines, head + scales
