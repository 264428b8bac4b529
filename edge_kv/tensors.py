"""The parameter table: every tensor of a model, its canonical name, shape and treatment.

Checkpoint readers map foreign names onto this table, the decoder's `state_dict` uses it, the
quantiser takes its policy from `kind`, and `memory` counts bytes with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from edge_kv.config import ModelConfig
from edge_kv.errors import ConfigError, did_you_mean
from edge_kv.formats import BLOCK, Format, find_format

EMBED = "embed"  # token table [vocab, hidden], tied to the LM head: one region serves both
PLE_TABLE = "ple_table"  # per-layer token table [vocab, n_layers * ple_dim]: a file of its own
LINEAR = "linear"  # [out, in]
KV = "kv"  # key and value projections of attention
PLE_LINEAR = "ple_linear"  # gates and projections of the per-layer embedding: 8 bits or more
EXPERT = "expert"  # stacked experts [n_experts, out, in]
HEAD = "head"  # LM head [vocab, hidden] of its own
TABLE = "table"  # whole numbers looked up by token id
LINEAR8 = "linear8"  # a small matrix that is not stored in fewer than 8 bits
EXPERT8 = "expert8"  # experts of which a token runs one: 8 bits or more
FLOAT = "float"  # norms, scalars, the router: kept in f32


@dataclass(frozen=True)
class TensorSpec:
    """One parameter: canonical name, shape and how the exporter treats it."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def elements(self) -> int:
        return prod(self.shape)


def tensor_table(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """All parameters of `config` in the order in which a forward pass meets them."""
    d, p = config.hidden, config.ple_dim
    table = [TensorSpec("embed.weight", (config.vocab_size, d), EMBED)]
    if p:
        width = config.n_layers * p
        table += [
            TensorSpec("ple_embed.weight", (config.vocab_size, width), PLE_TABLE),
            TensorSpec("ple_proj.weight", (width, d), PLE_LINEAR),
            TensorSpec("ple_norm.weight", (p,), FLOAT),
        ]
    for i in range(config.n_layers):
        table += _layer_tensors(config, i)
    table.append(TensorSpec("norm.weight", (d,), FLOAT))
    return tuple(table)


def _layer_tensors(config: ModelConfig, i: int) -> list[TensorSpec]:
    spec, d, p, width = config.spec(i), config.hidden, config.ple_dim, config.mlp(i)
    at = f"layers.{i}."
    rows: list[tuple[str, tuple[int, ...], str]] = [
        ("attn_norm.weight", (d,), FLOAT),
        ("attn.q_proj.weight", (spec.q_width, d), LINEAR),
        ("attn.q_norm.weight", (spec.head_dim,), FLOAT),
    ]
    if config.owns(i):
        rows.append(("attn.k_proj.weight", (spec.kv_width, d), KV))
        rows.append(("attn.k_norm.weight", (spec.head_dim,), FLOAT))
        if not spec.k_eq_v:
            rows.append(("attn.v_proj.weight", (spec.kv_width, d), KV))
    rows += [
        ("attn.o_proj.weight", (d, spec.q_width), LINEAR),
        ("post_attn_norm.weight", (d,), FLOAT),
        ("mlp_norm.weight", (d,), FLOAT),
        ("mlp.gate_proj.weight", (width, d), LINEAR),
        ("mlp.up_proj.weight", (width, d), LINEAR),
        ("mlp.down_proj.weight", (d, width), LINEAR),
        ("post_mlp_norm.weight", (d,), FLOAT),
    ]
    if config.moe:
        e, w = config.moe.n_experts, config.moe.width
        rows += [
            ("moe.dense_norm.weight", (d,), FLOAT),
            ("moe.router.scale", (d,), FLOAT),
            ("moe.router.proj.weight", (e, d), FLOAT),
            ("moe.router.expert_scale", (e,), FLOAT),
            ("moe.in_norm.weight", (d,), FLOAT),
            ("moe.gate_up", (e, 2 * w, d), EXPERT),
            ("moe.down", (e, d, w), EXPERT),
            ("moe.out_norm.weight", (d,), FLOAT),
        ]
    if p:
        rows += [
            ("ple.gate.weight", (p, d), PLE_LINEAR),
            ("ple.proj.weight", (d, p), PLE_LINEAR),
            ("ple.norm.weight", (d,), FLOAT),
        ]
    if config.family == "gemma4":
        rows.append(("scalar", (1,), FLOAT))
    return [TensorSpec(at + name, shape, kind) for name, shape, kind in rows]


# What each scheme stores a kind of tensor as: the name of a weight format. Kinds that are not named
# stay float. Values and keys are 5 % of the weights and a fifth of what 4 bits lose; gates and
# projections of the per-layer embedding are 2 %, and quantising them further doubles the divergence
# from the float model (exllamav3 issue 253).
SCHEMES: dict[str, dict[str, str]] = {
    "int4": {
        EMBED: "code4-s8", HEAD: "code4-s8", LINEAR: "code4-s8", EXPERT: "code4-s8",
        KV: "int8-s8", PLE_LINEAR: "int8-s8", LINEAR8: "int8-s8", EXPERT8: "int8-s8",
    },
    "int8": dict.fromkeys(
        (EMBED, HEAD, LINEAR, EXPERT, KV, PLE_LINEAR, LINEAR8, EXPERT8), "int8-f16"
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
