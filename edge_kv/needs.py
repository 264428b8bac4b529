"""What a model's weights and programs take, counted from its weight rows: no machine, no context.

Everything here is in the manifest of an artifact, so that a runtime counts nothing again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from edge_kv import models
from edge_kv.models.model import EXPERT, EXPERT8, FLOAT, PLE_TABLE, TABLE, Model, Weight
from edge_kv.tensors import PLE_BLOCK, ple_bits, stored_format, stored_shape, weight_formats


@dataclass(frozen=True)
class Needs:
    """Bytes, but for `row`."""

    weights: dict[str, int]  # in the weight file, by kind
    lookup_file: int  # per-layer token rows: a file of its own, read row by row
    dense: int  # weights that every token reads
    experts: int  # all routed experts, of which a token reads a few
    read_weights: int  # a decoded token reads of the weights
    read_experts: int  # … of them routed experts: a token's cycle
    prefill: int  # a chunk of a prompt reads of them
    row: int  # f32 values that a chunk of a prompt holds for each of its tokens, most at a time

    @property
    def weight_file(self) -> int:
        return sum(self.weights.values())


def stored_bytes(weight: Weight, quant: str, formats: Mapping[str, str] | None = None) -> int:
    """Bytes of one weight in its file; `formats` are those of the scheme when left out."""
    if weight.kind == TABLE:
        return 8 * weight.elements
    formats = weight_formats(quant) if formats is None else formats
    if weight.kind == PLE_TABLE and ple_bits(formats) < 32 and weight.shape[-1] % PLE_BLOCK == 0:
        return weight.elements * ple_bits(formats) // 8 + 2 * (weight.elements // PLE_BLOCK)
    fmt = stored_format(weight, formats)
    return prod(stored_shape(fmt, weight.shape)) if fmt else 4 * weight.elements


def count_needs(
    config: Model, quant: str = "int4", formats: Mapping[str, str] | None = None,
    drafter: Model | None = None,
) -> Needs:  # fmt: skip
    """What `config` needs with weights stored as `quant`; `formats` as in `stored_bytes`.

    A `drafter` takes memory beside it; what a token reads is without it (`read_by_draft`).

    Raises:
        ConfigError: an unknown quantisation.
    """
    formats = weight_formats(quant) if formats is None else formats
    kinds: dict[str, int] = {}
    lookup = dense = experts = read = cycle = chunk = 0
    weights = models.weights(config)
    for weight in weights:
        size = stored_bytes(weight, quant, formats)
        if weight.kind == PLE_TABLE:
            lookup = size
            continue
        kinds[weight.kind] = kinds.get(weight.kind, 0) + size
        read += round(size * weight.share)
        chunk += round(size * weight.prefill)
        if weight.kind in (EXPERT, EXPERT8):
            experts += size
            cycle += round(size * weight.share)
        elif weight.share:
            dense += size
    for weight in models.weights(drafter) if drafter else ():
        size = stored_bytes(weight, quant, formats)
        kinds[weight.kind] = kinds.get(weight.kind, 0) + size
        dense += size
    row = step_values(config, weights)
    return Needs(kinds, lookup, dense, experts, read, cycle, chunk, row)


def read_by_draft(
    drafter: Model, quant: str = "int4", formats: Mapping[str, str] | None = None
) -> int:
    """Bytes of weights that one draft reads."""
    rows = models.weights(drafter)
    return sum(round(stored_bytes(w, quant, formats) * w.share) for w in rows)


def step_values(config: Model, weights: Iterable[Weight]) -> int:
    """f32 values that a chunk of a prompt holds for each of its tokens.

    They are what lies between operators where most of it does (the residual and its norm, what a
    module projects them to, and as much again for the widest of these: queries before and after
    their norm), the workspace of the widest gated unit (both its products, and its two inputs in 8
    bits), and a token's rows from a file (decoded, put in order, added to what the program
    projects, and kept for all layers).
    """
    rows = config.token_rows
    given = rows.prefill * rows.dim if rows else 0
    modules: dict[str, list[Weight]] = {}
    for weight in weights:
        if weight.prefill and len(weight.shape) > 1 and weight.kind not in (FLOAT, TABLE):
            modules.setdefault(weight.name.rpartition(".")[0], []).append(weight)
    between = unit = 0
    for name, held in modules.items():
        opened = [_out(w) for w in held if w.shape[-1] == config.hidden]
        if any(w.name == f"{name}.down" for w in held):
            unit = max(unit, sum(opened) + (_ran(held[0]) * config.hidden + max(opened)) // 4)
        elif opened:
            between = max(between, sum(opened) + max(opened))
    return 2 * config.hidden + between + unit + 4 * given


def _ran(weight: Weight) -> int:
    """How many matrices of a stack a token goes through; 1 of a plain matrix."""
    return round(weight.share * weight.shape[0]) if len(weight.shape) > 2 else 1


def _out(weight: Weight) -> int:
    """Values that a token's products with `weight` have."""
    plain = len(weight.shape) == 2
    return round(weight.prefill * weight.shape[0]) if plain else _ran(weight) * weight.shape[1]
