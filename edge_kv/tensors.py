"""How each kind of tensor is stored: schemes of quantisation, and the weight formats under them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

from edge_kv.errors import ConfigError, did_you_mean
from edge_kv.formats import BLOCK, Format, find_format
from edge_kv.models.model import EMBED, EXPERT, EXPERT8, HEAD, KV, LINEAR, LINEAR8, PLE_TABLE

AUTO = "auto"  # asks for KEPT where the checkpoint is quantised, for DEFAULT where it is not
KEPT = "kept"  # every matrix in the format that keeps what the checkpoint holds
DEFAULT = "int4"
# What each scheme stores a kind of tensor as: the name of a weight format. Kinds that are not named
# stay float. Values and keys are 5 % of the weights and a fifth of what 4 bits lose; gates and
# projections of the per-layer embedding are 2 %, and quantising them further doubles the divergence
# from the float model (exllamav3 issue 253).
SCHEMES: dict[str, dict[str, str]] = {
    "int4": {
        EMBED: "code4-s8", HEAD: "code4-s8", LINEAR: "code4-s8", EXPERT: "code4-s8",
        KV: "int8-s8", LINEAR8: "int8-s8", EXPERT8: "int8-s8", PLE_TABLE: "int4-f16",
    },
    "int8": dict.fromkeys(
        (EMBED, HEAD, LINEAR, EXPERT, KV, LINEAR8, EXPERT8, PLE_TABLE), "int8-f16"
    ),
    "none": {},
}  # fmt: skip
PLE_FORMATS = ("int4-f16", "int8-f16")  # of the per-layer table, which is a file of rows
PLE_BLOCK = 32  # its values that share a scale


def weight_formats(scheme: str, changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The weight format of each kind of tensor under `scheme`; `changes` overrule it.

    Raises:
        ConfigError: an unknown scheme, kind or format.
    """
    if scheme not in SCHEMES:
        known = (AUTO, *SCHEMES)
        raise ConfigError(f"Unknown quantisation {scheme!r}.{did_you_mean(scheme, known)}")
    kinds = SCHEMES["int8"]
    for kind, name in (changes or {}).items():
        if kind not in kinds:
            raise ConfigError(f"Unknown kind of tensor {kind!r}.{did_you_mean(kind, kinds)}")
        find_format(name)
        if kind == PLE_TABLE and name not in PLE_FORMATS:
            raise ConfigError(
                f"The per-layer table cannot be {name}; choose {' or '.join(PLE_FORMATS)}."
            )
    return {**SCHEMES[scheme], **(changes or {})}


def storage(
    quant: str,
    specs: Iterable[Spec],
    held: Mapping[str, str],
    changes: Mapping[str, str] | None = None,
) -> tuple[str, dict[str, str]]:
    """(scheme, formats) of `--quant`: AUTO keeps what a quantised checkpoint holds.

    Args:
        specs: the model's tensors. held: the format that keeps each matrix of the checkpoint best,
            by name; empty where it holds floats. changes: formats of kinds that overrule it.

    Raises:
        ConfigError: as `weight_formats`.
    """
    if quant != AUTO or not held:
        scheme = DEFAULT if quant == AUTO else quant
        return scheme, weight_formats(scheme, changes)
    changes = weight_formats("none", changes)
    kinds = SCHEMES["int8"]
    wanted = {
        s.name: (s.kind, changes.get(s.kind) or held.get(s.name, kinds[s.kind]))
        for s in specs
        if s.kind in kinds
    }
    usual = {kind: Counter(f for k, f in wanted.values() if k == kind) for kind in kinds}
    formats = {kind: of.most_common(1)[0][0] for kind, of in usual.items() if of}
    formats |= {name: f for name, (kind, f) in wanted.items() if f != formats[kind]}
    return KEPT, formats


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


class Spec(Protocol):
    """What storage depends on: a tensor's name, kind and shape."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def stored_format(spec: Spec, formats: Mapping[str, str]) -> Format | None:
    """The format of a tensor; None for one that stays float: rows must be whole blocks.

    `formats` names those of kinds, and of single tensors that are kept otherwise.
    """
    name = formats.get(spec.name) or formats.get(spec.kind)
    return find_format(name) if name and spec.shape[-1] % BLOCK == 0 else None


def ple_bits(formats: Mapping[str, str]) -> int:
    """Bits of a value of the per-layer table; 32 where it stays float."""
    return find_format(formats[PLE_TABLE]).bits if PLE_TABLE in formats else 32


def stored_shape(fmt: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the uint8 array that holds a matrix [out, in] or a stack [n, out, in]."""
    return (*shape[:-2], *fmt.shape(*shape[-2:]))
