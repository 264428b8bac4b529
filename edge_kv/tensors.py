"""How each kind of tensor is stored: schemes of quantisation, and the weight formats under them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from edge_kv.errors import ConfigError, did_you_mean
from edge_kv.formats import BLOCK, Format, find_format
from edge_kv.models.model import EMBED, EXPERT, EXPERT8, HEAD, KV, LINEAR, LINEAR8

# What each scheme stores a kind of tensor as: the name of a weight format. Kinds that are not named
# stay float. Values and keys are 5 % of the weights and a fifth of what 4 bits lose; gates and
# projections of the per-layer embedding are 2 %, and quantising them further doubles the divergence
# from the float model (exllamav3 issue 253).
SCHEMES: dict[str, dict[str, str]] = {
    "int4": {
        EMBED: "code4-s8", HEAD: "code4-s8", LINEAR: "code4-s8", EXPERT: "code4-s8",
        KV: "int8-s8", LINEAR8: "int8-s8", EXPERT8: "int8-s8",
    },
    "int8": dict.fromkeys(
        (EMBED, HEAD, LINEAR, EXPERT, KV, LINEAR8, EXPERT8), "int8-f16"
    ),
    "none": {},
}  # fmt: skip
PLE_BITS = {"int4": 4, "int8": 8, "none": 32}  # of the per-layer table, which is a file of rows
PLE_BLOCK = 32  # its values that share a scale


def weight_formats(scheme: str, changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The weight format of each kind of tensor under `scheme`; `changes` overrule it.

    Raises:
        ConfigError: an unknown scheme, kind or format.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"Unknown quantisation {scheme!r}.{did_you_mean(scheme, SCHEMES)}")
    kinds = SCHEMES["int8"]
    for kind, name in (changes or {}).items():
        if kind not in kinds:
            raise ConfigError(f"Unknown kind of tensor {kind!r}.{did_you_mean(kind, kinds)}")
        find_format(name)
    return {**SCHEMES[scheme], **(changes or {})}


def parse_changes(words: Iterable[str]) -> dict[str, str]:
    """`kind=format` words as a mapping.

    Raises:
        ConfigError: a word without `=`.
    """
    changes = {}
    for word in words:
        kind, equals, name = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} says no format; write KIND=FORMAT, like embed=int8-f16.")
        changes[kind] = name
    return changes


def stored_format(kind: str, shape: tuple[int, ...], formats: Mapping[str, str]) -> Format | None:
    """The format of a tensor; None for one that stays float: rows must be whole blocks."""
    name = formats.get(kind)
    return find_format(name) if name and shape[-1] % BLOCK == 0 else None


def stored_shape(fmt: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the uint8 array that holds a matrix [out, in] or a stack [n, out, in]."""
    return (*shape[:-2], *fmt.shape(*shape[-2:]))
