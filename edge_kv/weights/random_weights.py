"""Seeded random weights of any size: speed and memory are real, the text is not.

Every block of rows has its own generator, keyed by seed, tensor name and block number, so that any
row range of any tensor can be made alone and always has the same values.
"""

from __future__ import annotations

import hashlib
from math import prod, sqrt

import numpy as np

from edge_kv.config import ModelConfig
from edge_kv.tensors import EMBED, FLOAT, PLE_TABLE, TensorSpec
from edge_kv.weights.source import Array, Readable

_BLOCK = 1 << 18  # values a generator makes: half a MiB of bits, small enough for L2
_STD = sqrt(2 * (256**2 - 1) / 12)  # of the difference of two uniform int8
_SCORE_STD = 2.0  # of attention scores: attention is neither flat nor one-hot


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


class RandomWeights(Readable):
    """Weights drawn from a triangular distribution, scaled so that activations stay near 1."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__(config, f"random weights, seed {seed}")
        self._seed = seed

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        return self.load(
            name, start, stop
        )  # finite by construction: no second look at 4.6 G values

    def load(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        spec, stop = self._request(name, start, stop)
        centre, std = self._centre_and_std(spec)
        return random_rows(self._seed, name, spec.shape, start, stop, centre, std)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self._table.items()}

    def surplus(self) -> list[str]:
        return []

    def _centre_and_std(self, spec: TensorSpec) -> tuple[float, float]:
        name, fan_in = spec.name, spec.shape[-1]
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            # q and k have unit RMS before their norm weights w, so that a score has the standard
            # deviation attention_scale * sqrt(head_dim) * w_q * w_k.
            w = sqrt(_SCORE_STD / (self.config.attention_scale * sqrt(fan_in)))
            return w, 0.1 * w
        if name.endswith("router.proj.weight"):
            # Its input is scaled by hidden**-0.5; std 2 makes router logits of std 2.
            return 0.0, 2.0
        if spec.kind == EMBED:
            return 0.0, 1 / sqrt(self.config.hidden)
        if spec.kind == PLE_TABLE:
            return 0.0, 1 / sqrt(self.config.ple_dim)
        if spec.kind == FLOAT:  # norms, scalars, router scales
            return 1.0, 0.04 if name.endswith("scalar") else 0.1
        return 0.0, 1 / sqrt(fan_in)
