"""Checkpoints of `quant_method: gemma`: integers of 2, 4 or 8 bits with a scale for each row.

`x.weight` [out, in * bits / 8] holds value + 2^(bits-1), the first in the low bits (8 bits: the
value as it is), and `x.weight_scale` [out, 1] its scale; `x.embedding_quantized` and
`x.embedding_scale` are a table, with a scale a row or several. Scalars `input_activation_scale` and
`output_activation_scale` are the steps to which a linear's inputs and outputs are rounded, 0 for
none. Scales of a quantised cache come along and are not used, here and in transformers: a state of
ours has scales of its own. The meaning is that of transformers' `integrations/gemma_quant.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_kv.errors import ConfigError
from edge_kv.formats import BLOCK, FORMATS, Array, Quantised
from edge_kv.weights.compressed_tensors import are_halves
from edge_kv.weights.source import Stored

QUANTISATION = "quantization_config"  # the key of config.json
_BITS = (2, 4, 8)
_PAIRS = (("weight", "weight_scale"), ("embedding_quantized", "embedding_scale"))
_UNUSED = (".k_cache_scale", ".v_cache_scale")
_STEPS = ("input_activation_scale", "output_activation_scale")


def is_gemma_quant(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes such a checkpoint."""
    found = config.get(QUANTISATION)
    return isinstance(found, dict) and found.get("quant_method") == "gemma"


def joined_integers(
    stored: Mapping[str, Stored], quantisation: Mapping[str, Any]
) -> dict[str, Stored]:
    """The same tensors; integers and their scales are `x.weight`, and what belongs to them is gone.

    Args:
        quantisation: `quantization_config` of config.json.

    Raises:
        ConfigError: a number of bits that is not one of 2, 4 and 8, or patterns that are none.
    """
    widths = _Widths(quantisation)
    out = {name: tensor for name, tensor in stored.items() if not name.endswith(_UNUSED)}
    for name in stored:
        base, _, ending = name.rpartition(".")
        for values, scale in _PAIRS:
            if ending == values and f"{base}.{scale}" in stored:
                steps = [out.pop(f"{base}.{s}", None) for s in _STEPS]
                taken = out.pop(name), out.pop(f"{base}.{scale}")
                out[f"{base}.weight"] = _joined(*taken, widths.bits(base), steps)
    return out


class _Widths:
    """Bits of each module, as the config says them: the first pattern that is found counts."""

    def __init__(self, quantisation: Mapping[str, Any]):
        self._default = self._checked(quantisation.get("num_bits", 4))
        self._patterns = []
        configs = quantisation.get("module_quant_configs") or {}
        if not isinstance(configs, dict):
            raise ConfigError(
                f"quantization_config: module_quant_configs is {str(configs)[:40]!r}, expected an "
                "object of patterns."
            )
        for pattern, options in configs.items():
            try:
                found = re.compile(pattern)
                bits = options.get("num_bits", self._default)
            except (re.error, AttributeError) as e:
                raise ConfigError(
                    f"quantization_config: module_quant_configs has {pattern!r}, expected a "
                    f"pattern and its num_bits ({e})."
                ) from None
            self._patterns.append((found, self._checked(bits)))

    @staticmethod
    def _checked(bits: object) -> int:
        if bits not in _BITS:
            raise ConfigError(f"quantization_config: num_bits is {bits!r}, expected 2, 4 or 8.")
        assert isinstance(bits, int)
        return bits

    def bits(self, module: str) -> int:
        return next((bits for found, bits in self._patterns if found.search(module)), self._default)


def _joined(values: Stored, scale: Stored, bits: int, steps: list[Stored | None]) -> Stored:
    whole = {"I8": (8,), "U8": (2, 4)}.get(values.dtype, ())
    scales = scale.shape[1] if len(scale.shape) == 2 and scale.shape[0] == values.shape[0] else 0
    width = values.shape[-1] * 8 // bits if len(values.shape) == 2 else 0
    raw = values.raw
    if bits not in whole or raw is None or scale.fault or not scales or width % scales:
        return Stored(
            values.shape, values.rows,
            f"{values.dtype} {values.shape} with scales {scale.shape}; {bits}-bit integers and "
            "scales of each row can be read",
        )  # fmt: skip
    fmt = FORMATS[f"int{bits}-row" if scales == 1 else f"int{max(bits, 4)}-f16"]
    low = np.int8(-(1 << bits - 1))
    if scales > 1 and width % (scales * BLOCK):
        return Stored(values.shape, values.rows, f"scaled in {width // scales}s; whole 32s can be")

    def codes(start: int, stop: int) -> Array:
        packed: Array = raw(start, stop)
        if bits == 8:
            return packed
        fields = packed[:, :, None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8(2**bits - 1)
        found: Array = fields.reshape(len(packed), -1).view(np.int8) + low
        return found

    def integers(start: int, stop: int) -> Quantised:
        found = scale.rows(start, stop)
        if scales == 1:
            return Quantised(codes(start, stop), None, found[:, 0])
        halves = np.repeat(found.astype(np.float16), width // scales // BLOCK, 1)
        return Quantised(codes(start, stop), halves, None)

    def rows(start: int, stop: int) -> Array:
        found: Array = codes(start, stop) * np.repeat(scale.rows(start, stop), width // scales, 1)
        return found

    read = tuple(float(s.rows(0, 1)[0]) if s is not None else 0.0 for s in steps)
    return Stored(
        (values.shape[0], width), rows, dtype=f"INT{bits}", format=fmt.name, integers=integers,
        exact=scales == 1 or are_halves(scale), steps=(read[0], read[1]),
    )  # fmt: skip
