"""Tensors stored as 8- or 4-bit floats with a scale for each block, as DeepSeek publishes them.

`x.weight` in F8_E4M3 has `x.scale` with one power of two for 128 x 128 values; `x.weight` of bytes
holds two E2M1 numbers each, the first in the low bits (OCP microscaling, MXFP4), and `x.scale` one
power of two for 32 values of a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_kv.weights.source import Array, Stored

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_BLOCK = {"F8_E4M3": (128, 128), "I8": (1, 32), "U8": (1, 32)}  # (rows, values) of a scale
_NAMES = (("weight", "scale"), ("weight", "weight_scale_inv"))


def joined_scales(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The same tensors; those with a table of scales are whole floats, and the tables are gone."""
    out = dict(stored)
    for name, tensor in stored.items():
        for ending, scale in _NAMES:
            of = name.removesuffix(ending) + scale
            if name.endswith("." + ending) and of in stored and tensor.dtype in _BLOCK:
                out[name] = _joined(tensor, stored[of])
                del out[of]
                break
    return out


def _joined(tensor: Stored, scale: Stored) -> Stored:
    rows_of, values = _BLOCK[tensor.dtype]
    packed = tensor.dtype != "F8_E4M3"
    n_out, n_in = tensor.shape if len(tensor.shape) == 2 else (0, 0)
    n_in *= 2 if packed else 1
    need = (-(-n_out // rows_of), -(-n_in // values))
    fault = tensor.fault if not packed else ""
    if scale.fault or scale.shape != need:
        fault = fault or f"stored with scales of shape {scale.shape}, expected {need}"

    def rows(start: int, stop: int) -> Array:
        block = tensor.rows(start, stop)
        if packed:
            block = _unpacked(block)
        first, last = start // rows_of, -(-stop // rows_of)
        factors = np.repeat(scale.rows(first, last), rows_of, 0)[start - first * rows_of :]
        block *= np.repeat(factors[: stop - start], values, 1)[:, :n_in]
        return block

    return Stored((n_out, n_in), rows, fault)


def _unpacked(packed: Array) -> Array:
    """Bytes [rows, n] as numbers to E2M1 values [rows, 2n]."""
    codes = packed.astype(np.int16) & 255
    pairs: Array = np.stack((_E2M1[codes & 15], _E2M1[codes >> 4]), -1)
    return pairs.reshape(packed.shape[0], -1)
