"""Random weights of any model, drawn as they are stored: speed and memory are real, text is not.

Where a layout packs a matrix, its bytes are drawn and given scales; nothing is rounded, so that a
model of any size is written as fast as the disk takes it. What such a matrix "is" are the values
that its bytes stand for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from edge_kv import models
from edge_kv.formats import GROUP, LINE, Array, Format, Quantised, dequantise, unpack, value_lines
from edge_kv.models.model import EXPERT, EXPERT8, FLOAT, TABLE, Model, Weight
from edge_kv.tensors import stored_format, stored_shape
from edge_kv.weights.random_rows import random_rows
from edge_kv.weights.source import Text

_DRAWN = 1 << 20  # bytes that a generator makes: whole groups, one at least
_STRIDE = 7919  # between the entries of neighbours in a table; no divisor of a vocabulary
# What a byte makes of a scale: 64 … 127, and a sign, so that no sum of products has a direction.
_STEPS = np.array([(64 + b % 64) * (1 if b < 128 else -1) for b in range(256)], np.int8)
_STEP = float(np.sqrt(np.square(_STEPS, dtype=np.float64).mean()))


class RandomSource:
    """Seeded random weights of `config`, in the formats of their kinds."""

    def __init__(self, config: Model, seed: int, formats: Mapping[str, str]):
        self.config, self.seed, self.label = config, seed, f"random weights, seed {seed}"
        self.text: Text | None = None
        self.files: list[Path] = []
        self.rows = {row.name: row for row in models.weights(config)}
        self._formats = formats
        stacks = (r.shape[0] for r in self.rows.values() if r.kind in (EXPERT, EXPERT8))
        self._experts = next(stacks, 1)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        """Rows start … stop-1 of a weight, as f32."""
        row = self.rows[name]
        stop = row.shape[0] if stop is None else stop
        fmt = stored_format(row, self._formats)
        if fmt is not None and len(row.shape) == 3:
            packed = self._packed(row, fmt, start, stop)
            return np.stack([dequantise(fmt, unpack(fmt, m, *row.shape[1:])) for m in packed])
        if fmt is not None:
            return dequantise(fmt, self._integers(name, fmt, start, stop))
        if row.kind == TABLE:
            if len(row.shape) == 1:  # every row's number once, far from its neighbours'
                return (np.arange(start, stop) * _STRIDE % row.shape[0]).astype(np.float32)
            place = (np.arange(start, stop) * _STRIDE)[:, None]
            # distinct experts for each token
            return ((place + np.arange(row.shape[1])) % self._experts).astype(np.float32)
        if row.drawn:
            centre, std = row.drawn
        elif row.kind == FLOAT and len(row.shape) == 1:
            centre, std = (0.0, 0.02) if "bias" in name else (1.0, 0.1)
        else:
            fan_in = row.shape[-1] if row.kind != FLOAT else prod(row.shape[1:])
            centre, std = 0.0, fan_in**-0.5
        return random_rows(self.seed, name, row.shape, start, stop, centre, std)

    def check(self) -> None:
        """There is nothing that could be wrong."""

    def formats(self) -> Mapping[str, str]:
        """None are held: matrices are drawn in any format."""
        return {}

    def steps(self) -> Mapping[str, tuple[float, float]]:
        """None: nothing is rounded."""
        return {}

    def is_exact(self, name: str) -> bool:
        """What is drawn is what is read."""
        return True

    def packed(self, name: str, fmt: Format, start: int, stop: int) -> Array | None:
        """Rows start … stop-1, from a whole group on, as `fmt` stores them: u8 [groups, stride].

        Of a stack, matrices start … stop-1: u8 [stop - start, groups, stride]. None where the
        tensor is drawn in another format.
        """
        row = self.rows[name]
        if stored_format(row, self._formats) != fmt:
            return None
        return self._packed(row, fmt, start, stop)

    def _packed(self, row: Weight, fmt: Format, start: int, stop: int) -> Array:
        name, shape = row.name, row.shape
        std = row.drawn[1] if row.drawn else shape[-1] ** -0.5
        groups, stride = stored_shape(fmt, shape)[-2:]
        if len(shape) == 3:
            out = np.empty((stop - start, groups, stride), np.uint8)
            for i in range(start, stop):
                one = f"{name}/{i}"
                self._fill(out[i - start], one, fmt, shape[1], shape[2], 0, groups, std)
            return out
        first, last = start // GROUP, -(-stop // GROUP)
        out = np.empty((last - first, stride), np.uint8)
        self._fill(out, name, fmt, shape[0], shape[1], first, last, std)
        return out

    def integers(self, name: str, fmt: Format, start: int, stop: int) -> Quantised | None:
        """Rows start … stop-1 of a matrix in `fmt`, as `packed` draws them."""
        drawn = stored_format(self.rows[name], self._formats) == fmt
        return self._integers(name, fmt, start, stop) if drawn else None

    def _integers(self, name: str, fmt: Format, start: int, stop: int) -> Quantised:
        first, row = start // GROUP * GROUP, self.rows[name]
        packed = self._packed(row, fmt, first, stop)
        q = unpack(fmt, packed, stop - first, row.shape[1])
        scales = (s if s is None else s[start - first :] for s in (q.block_scales, q.row_scales))
        return Quantised(q.codes[start - first :], *scales)

    def _fill(
        self, out: Array, name: str, fmt: Format, rows: int, cols: int, first: int, last: int,
        std: float,
    ) -> None:  # fmt: skip
        """Groups first … last-1 of a matrix; each block of them has a generator of its own."""
        stride = out.shape[1]
        step = max(1, _DRAWN // stride)
        for block in range(first // step, -(-last // step)):
            begin, end = block * step, min((block + 1) * step, -(-rows // GROUP))
            drawn = _bytes(f"{self.seed}/{name}/{block}", (end - begin) * stride)
            groups = drawn.reshape(end - begin, stride)
            _scale(groups, fmt, rows - begin * GROUP, cols, std)
            a, b = max(first, begin), min(last, end)
            out[a - first : b - first] = groups[a - begin : b - begin]


def _bytes(key: str, n: int) -> Array:
    words = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=16).digest(), "<u4").tolist()
    bits = np.random.SFC64(np.random.SeedSequence(words)).random_raw(-(-n // 8))
    return bits.astype("<u8", copy=False).view(np.uint8)[:n]


def _scale(groups: Array, fmt: Format, rows: int, cols: int, std: float) -> None:
    """Make scales of the bytes where `groups` [n, stride] keep theirs, for values of deviation
    `std`; those that fill up the last group, and the last line of block scales, are 0."""
    codes = np.array(fmt.levels or range(fmt.low, fmt.high + 1), np.float64)
    unit = std * np.square(codes).mean() ** -0.5
    lines = groups.reshape(len(groups), -1, LINE)
    used = np.arange(len(groups) * GROUP).reshape(-1, 1, GROUP) < rows
    around_unit = _STEPS * (unit / _STEP)
    if fmt.has_row_scales:
        factors = around_unit if fmt.block_scale is None else np.full(256, unit / _STEP)
        by_row = factors.astype(np.float32)[lines[:, 0, ::4]] * used[:, 0]
        lines[:, 0] = by_row.view(np.uint8)
    if fmt.block_scale is not None:
        _, at = value_lines(fmt, cols)
        steps = _STEPS if fmt.has_row_scales else around_unit.astype(np.float16)
        drawn = lines[:, at].reshape(len(groups), -1, GROUP, fmt.block_scale.itemsize)[..., 0]
        by_block = steps[drawn] * used
        by_block[:, fmt.blocks(cols) :] = 0
        lines[:, at] = by_block.view(np.uint8).reshape(len(groups), -1, LINE)
