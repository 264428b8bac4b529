"""GGUF's quantised blocks as integers and scales of our own formats, without any rounding.

A block of these types is 32 integers times one half: what `int4-f16` and `int8-f16` store. Types
with a minimum, or with a scale for fewer values, fit no format exactly; eight bits come nearest.
Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_kv.formats import Array, Quantised

NEAREST = "int8-f16"  # for quantised types that no format holds exactly
_FLOATS = ("F64", "F32", "F16", "BF16")
_HALF = 2  # bytes of a block's scale, which is its first field
# The levels of IQ4_NL, in the unit of its scale.
_NON_LINEAR = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)


def _nibbles(packed: Array) -> Array:
    """u8 [blocks, 16] -> [blocks, 32]: all low halves, then all high ones."""
    return np.concatenate((packed & 15, packed >> 4), 1)


def _q4_0(fields: Array) -> Array:
    codes: Array = _nibbles(fields).view(np.int8) - np.int8(8)
    return codes


def _q5_0(fields: Array) -> Array:
    fifth = np.unpackbits(fields[:, :4], axis=1, bitorder="little")
    codes: Array = (_nibbles(fields[:, 4:]) | fifth << 4).view(np.int8) - np.int8(16)
    return codes


def _q8_0(fields: Array) -> Array:
    values: Array = fields.view(np.int8)
    return values


def _iq4_nl(fields: Array) -> Array:
    return _NON_LINEAR[_nibbles(fields)]


# GGML type -> (our format, what makes int8 [blocks, 32] of the bytes behind the scale).
_EXACT: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "Q4_0": ("int4-f16", _q4_0),
    "Q5_0": ("int8-f16", _q5_0),
    "Q8_0": ("int8-f16", _q8_0),
    "IQ4_NL": ("int8-f16", _iq4_nl),
}


def kept_as(kind: str) -> str:
    """The weight format that keeps a GGML type best; "" for floats."""
    if kind in _FLOATS:
        return ""
    return _EXACT[kind][0] if kind in _EXACT else NEAREST


def is_exact(kind: str) -> bool:
    """Whether `kept_as` loses nothing."""
    return kind in _EXACT


def integers(kind: str, raw: Array, block_bytes: int) -> Quantised:
    """The blocks of `raw` u8 [rows, bytes of a row], of an exact type, in its format."""
    blocks = raw.reshape(-1, block_bytes)
    codes = _EXACT[kind][1](np.ascontiguousarray(blocks[:, _HALF:]))
    scales = np.ascontiguousarray(blocks[:, :_HALF]).view("<f2")
    return Quantised(
        np.ascontiguousarray(codes).reshape(len(raw), -1), scales.reshape(len(raw), -1), None
    )
