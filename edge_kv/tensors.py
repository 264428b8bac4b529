"""The parameter table: every tensor of a model, its canonical name, shape and treatment.

Checkpoint readers map foreign names onto this table, the decoder's `state_dict` uses it, the
quantiser takes its policy from `kind`, and `memory` counts bytes with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from edge_kv.config import ModelConfig
from edge_kv.errors import ConfigError, did_you_mean

EMBED = "embed"  # token table [vocab, hidden], tied to the LM head: one region serves both
PLE_TABLE = "ple_table"  # per-layer token table [vocab, n_layers * ple_dim]: a file of its own
LINEAR = "linear"  # [out, in]
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
        rows.append(("attn.k_proj.weight", (spec.kv_width, d), LINEAR))
        rows.append(("attn.k_norm.weight", (spec.head_dim,), FLOAT))
        if not spec.k_eq_v:
            rows.append(("attn.v_proj.weight", (spec.kv_width, d), LINEAR))
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


SCHEMES = ("int4", "int8", "none")
_SMALL = {PLE_LINEAR: 8, LINEAR8: 8, EXPERT8: 8}
_BITS = {
    "int4": {EMBED: 4, HEAD: 4, LINEAR: 4, EXPERT: 4, PLE_TABLE: 4, **_SMALL},
    "int8": {EMBED: 8, HEAD: 8, LINEAR: 8, EXPERT: 8, PLE_TABLE: 8, **_SMALL},
    "none": {},
}


def stored_bits(kind: str, scheme: str) -> int:
    """Bits a value of a tensor of `kind` takes under quantisation `scheme`; 32 is float.

    PLE gates and projections keep 8 bits under int4: they are 2 % of the weights, and quantising
    them further doubles the divergence from the float model (exllamav3 issue 253).

    Raises:
        ConfigError: unknown scheme.
    """
    if scheme not in _BITS:
        raise ConfigError(f"Unknown quantisation {scheme!r}.{did_you_mean(scheme, SCHEMES)}")
    return _BITS[scheme].get(kind, 32)


BLOCK_SIZES = (128, 64, 32)
DEFAULT_BLOCK = 32


def block_size(asked: int | None) -> int:
    """`asked`, or the default when None.

    Raises:
        ConfigError: no block size that is packed.
    """
    if asked is None:
        return DEFAULT_BLOCK
    if asked not in BLOCK_SIZES:
        *others, last = sorted(BLOCK_SIZES)
        sizes = f"{', '.join(map(str, others))} or {last}"
        raise ConfigError(f"block size {asked} is not supported; use {sizes}.")
    return asked


def block_for(width: int, block_size: int) -> int:
    """The largest supported block, at most `block_size`, that divides rows of `width` values.

    Returns 0 when no block of 32, 64 or 128 fits: such a tensor stays float.
    """
    return next((b for b in BLOCK_SIZES if b <= block_size and width % b == 0), 0)
