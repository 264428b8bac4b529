"""Seeded random weights of any size: speed and memory are real, the text is not.

Every block of rows has its own generator, keyed by seed, tensor name and block number, so that any
row range of any tensor can be made alone and always has the same values.
"""

from __future__ import annotations

import hashlib
from math import prod, sqrt

import numpy as np

from edge_kv.weights.source import Array

_BLOCK = 1 << 18  # values a generator makes: half a MiB of bits, small enough for L2
_STD = sqrt(2 * (256**2 - 1) / 12)  # of the difference of two uniform int8


def random_rows(
    seed: int, name: str, shape: tuple[int, ...], start: int, stop: int, centre: float, std: float
) -> Array:
    """Rows start … stop-1 of the tensor `name` of `shape`, the same whatever range is asked for."""
    width = prod(shape[1:])
    step = max(1, _BLOCK // width)  # rows a generator makes
    out = np.empty((stop - start, width), np.float32)
    for block in range(start // step, -(-stop // step)):
        first = block * step
        a, b = max(start, first), min(stop, first + step)
        # A block is always drawn whole: its rows do not depend on the range asked for.
        rows = min(step, shape[0] - first)
        drawn = _draw(seed, name, block, rows * width).reshape(rows, width)
        np.multiply(
            drawn[a - first : b - first], np.float32(std / _STD), out=out[a - start : b - start]
        )
    if centre:
        out += np.float32(centre)
    return out.reshape(stop - start, *shape[1:])


def _draw(seed: int, name: str, block: int, n: int) -> np.ndarray[tuple[int], np.dtype[np.int16]]:
    """`n` integers in -255 … 255, triangular around 0: int8 pairs are the cheapest bits."""
    key = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=16).digest()
    words = np.frombuffer(key, "<u4").tolist()
    bits = np.random.SFC64(np.random.SeedSequence(words)).random_raw(-(-n // 4))
    pairs = bits.astype("<u8", copy=False).view(np.int8)
    half = pairs.size // 2
    return np.subtract(pairs[:n], pairs[half : half + n], dtype=np.int16)
