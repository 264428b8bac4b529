"""Checkpoints of compressed-tensors in its `pack-quantized` form: 4- or 8-bit integers in int32.

`x.weight_packed` int32 [out, in * bits / 32] holds value + 2^(bits-1), the first in the low bits;
`x.weight_scale` [out, groups] a scale for in / groups values of a row; `x.weight_shape` [2] what
was packed. Layout: https://github.com/vllm-project/compressed-tensors, `pack_quantized.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_kv.formats import BLOCK, FORMATS, Array, Quantised
from edge_kv.weights.source import Stored

_PACKED, _SCALE, _SHAPE = "weight_packed", "weight_scale", "weight_shape"
# What makes integers asymmetric, or puts columns in another order.
_REFUSED = {"weight_zero_point": "with zero points", "weight_g_idx": "in an order of its own"}
_BITS = (4, 8)
_CHECKED = 1 << 20  # scales that are looked at together


def is_pack_quantised(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes weights of this form, and nothing else in few bits."""
    found = config.get("quantization_config")
    return (
        isinstance(found, dict)
        and found.get("quant_method") == "compressed-tensors"
        and found.get("format") == "pack-quantized"
        and not found.get("kv_cache_scheme")
        and not found.get("transform_config")  # rotations of activations
    )


def joined_packed(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The same tensors; packed ones are `x.weight`, and what belongs to them is gone."""
    out = dict(stored)
    for name in stored:
        base, _, ending = name.rpartition(".")
        if ending == _PACKED:
            parts = {e: out.pop(f"{base}.{e}", None) for e in (_SCALE, _SHAPE, *_REFUSED)}
            out[f"{base}.weight"] = _joined(out.pop(name), parts)
    return out


def _joined(packed: Stored, parts: Mapping[str, Stored | None]) -> Stored:
    scale, shape = parts[_SCALE], parts[_SHAPE]
    fault = next((f"packed {why}" for e, why in _REFUSED.items() if parts[e]), "")
    if scale is None or scale.fault or shape is None or shape.raw is None or shape.shape != (2,):
        return Stored(packed.shape, packed.rows, fault or "packed without its scales or its shape")
    n_out, n_in = (int(n) for n in shape.raw(0, 2))
    bits = next((b for b in _BITS if packed.shape == (n_out, -(-n_in * b // 32))), 0)
    groups = scale.shape[1] if len(scale.shape) == 2 and scale.shape[0] == n_out else 0
    whole = groups == 1 or (groups > 1 and n_in % (groups * BLOCK) == 0)
    if fault or packed.raw is None or not (bits and whole):
        fault = fault or (
            f"{packed.dtype} {packed.shape} with scales {scale.shape} for {(n_out, n_in)}; 4 or 8 "
            "bits and groups of whole 32s can be read"
        )
        return Stored(packed.shape, packed.rows, fault)
    fmt = FORMATS[f"int{bits}-row" if groups == 1 else f"int{bits}-f16"]
    raw, scales = packed.raw, scale.rows

    def codes(start: int, stop: int) -> Array:
        words = np.ascontiguousarray(raw(start, stop)).view(np.uint32)
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        fields = words[:, :, None] >> shifts & np.uint32(2**bits - 1)
        return (fields.astype(np.int16) + fmt.low).astype(np.int8).reshape(len(words), -1)[:, :n_in]

    def integers(start: int, stop: int) -> Quantised:
        found = scales(start, stop)
        if groups == 1:
            return Quantised(codes(start, stop), None, found[:, 0])
        by_block = np.repeat(found.astype(np.float16), n_in // groups // BLOCK, 1)
        return Quantised(codes(start, stop), by_block, None)

    def rows(start: int, stop: int) -> Array:
        values: Array = codes(start, stop) * np.repeat(scales(start, stop), n_in // groups, 1)
        return values

    return Stored(
        (n_out, n_in), rows, dtype=f"INT{bits}", format=fmt.name, integers=integers,
        exact=groups == 1 or are_halves(scale),
    )  # fmt: skip


def are_halves(scale: Stored) -> bool:
    """Whether every scale is a 16-bit float: those of bf16 are, but for the smallest."""
    step = max(1, _CHECKED // scale.shape[1])
    parts = (scale.rows(i, min(i + step, scale.shape[0])) for i in range(0, scale.shape[0], step))
    with np.errstate(over="ignore"):
        return all(np.array_equal(p, p.astype(np.float16).astype(np.float32)) for p in parts)
