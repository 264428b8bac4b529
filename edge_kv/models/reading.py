"""What several models read alike from a Hugging Face config.json or GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edge_kv.models.model import Llama3, Rope, Yarn
from edge_kv.weights.fields import Fields

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def sizes(fields: Fields, layers: str = "num_hidden_layers") -> dict[str, Any]:
    """The fields of every `Model`, as most config.json files spell them."""
    fields.refuse_unless("per_layer_config", {})  # transformers builds layers by it
    return {
        "vocab": fields.integer("vocab_size"),
        "hidden": fields.integer("hidden_size"),
        "layers": fields.n_layers(layers),
        "max_ctx": fields.integer("max_position_embeddings"),
        "norm_eps": fields.number("rms_norm_eps"),
        "eos_ids": fields.ids("eos_token_id"),
        "bos_id": token(fields, "bos_token_id"),
        "pad_id": token(fields, "pad_token_id"),
    }


def token(fields: Fields, key: str) -> int | None:
    """A token id, or None where there is none."""
    return next(iter(fields.ids(key)), None)


def letters(fields: Fields, key: str, known: Mapping[str, str], layers: int) -> str | None:
    """A list of layer types as one letter a layer; None where it is absent."""
    types = fields.get(key)
    if types is None:
        return None
    if not isinstance(types, list) or len(types) < layers:
        raise fields.fault(key, f"a list of {layers} layer types")
    for t in types:
        if not isinstance(t, str) or t not in known:
            raise fields.unsupported(key, t, " and ".join(known))
    return "".join(known[t] for t in types[:layers])


def nested(fields: Fields, key: str) -> dict[str, Any]:
    """An object inside the config; empty where it is absent or false."""
    value = fields.get(key)
    if not value:
        return {}
    if not isinstance(value, dict):
        raise fields.fault(key, "an object")
    return value


def one_rope(fields: Fields) -> dict[str, Any]:
    """The rope object of a model that has one, by transformers' rule.

    The older `rope_scaling` counts before `rope_parameters`, and the length that a model was first
    trained for counts where it stands beside the object, before the one in it.
    """
    entry = dict(nested(fields, "rope_scaling") or nested(fields, "rope_parameters"))
    trained = "original_max_position_embeddings"
    if fields.get(trained) is not None:
        entry[trained] = fields.get(trained)
    entry.setdefault("partial_rotary_factor", fields.get("partial_rotary_factor"))
    return entry


def rope(
    fields: Fields, dim: int, defaults: Mapping[str, Any], *, gain: float | None = None
) -> Rope:
    """The rotary embedding that a rope object describes.

    Args:
        fields: the object (`rope_parameters` of one layer type, or the older `rope_scaling`).
        dim: dims of a head; `partial_rotary_factor` is the share of them that turns.
        defaults: for keys the object may leave out.
        gain: what cos and sin are multiplied by where the object does not say it; YaRN's own rule
            when left out.

    Raises:
        ConfigError: a rope type no net here computes, or a value it cannot have.
    """
    said = fields.get("type")  # the older name of rope_type
    kind = "default" if said is None else said
    entry = Fields(
        fields.values,
        fields.where,
        {"rope_type": kind, "partial_rotary_factor": 1.0, **defaults},
    )
    kind = entry.get("rope_type")
    if kind not in ROPE_TYPES:
        raise entry.unsupported("rope_type", kind, ", ".join(ROPE_TYPES))
    theta, share = positive(entry, "rope_theta"), positive(entry, "partial_rotary_factor")
    if share > 1:
        raise entry.fault("partial_rotary_factor", "a share of at most 1")
    whole = Rope.whole(theta, int(dim * share))
    if kind == "default":
        return whole
    factor = positive(entry, "factor")
    if kind == "linear":
        return Rope(theta, whole.dim, whole.pairs, factor)
    original = entry.integer("original_max_position_embeddings")
    if original < 1:
        raise entry.fault("original_max_position_embeddings", "a positive number of tokens")
    if kind == "llama3":
        low, high = positive(entry, "low_freq_factor"), positive(entry, "high_freq_factor")
        if low >= high:
            raise entry.fault("low_freq_factor", f"less than high_freq_factor ({high:g})")
        return Rope(theta, whole.dim, whole.pairs, factor, Llama3(original, low, high))
    for key in ("mscale", "mscale_all_dim"):
        entry.refuse_unless(key)
    entry.refuse_unless("truncate", True)
    fast = positive(entry, "beta_fast") if entry.get("beta_fast") is not None else 32.0
    slow = positive(entry, "beta_slow") if entry.get("beta_slow") is not None else 1.0
    if entry.get("attention_factor") is not None:
        gain = positive(entry, "attention_factor")
    if gain is None:
        gain = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return Rope(theta, whole.dim, whole.pairs, factor, Yarn(original, fast, slow), gain)


def positive(fields: Fields, key: str) -> float:
    value = fields.number(key)
    if value <= 0:
        raise fields.fault(key, "a positive number")
    return value


def gguf_rope_factor(fields: Fields) -> float:
    """What positions are divided by in a GGUF file; llama.cpp reads 0 as 1, like no scaling."""
    fields.refuse_unless("rope.scaling.type", "none", "linear")
    fields.refuse_unless("rope.scaling.attn_factor", 1)
    if fields.get("rope.scaling.type") == "none":
        return 1.0
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        if factor := fields.positive(key, or_zero=True):
            return factor
    return 1.0


def by_type(
    fields: Fields,
    types: Sequence[str],
    dim: int,
    defaults: Mapping[str, Mapping[str, Any]],
    loose: Sequence[str] = (),
) -> dict[str, Rope]:
    """The ropes of `rope_parameters`, an object with one rope object a layer type.

    Args:
        defaults: what stands for a rope object that is not there at all: one that is there has
            none of it, as in transformers.
        loose: names that may also stand beside `rope_parameters`.
    """
    fields.refuse_unless("rope_scaling", False)
    given = nested(fields, "rope_parameters")
    beside = {name: fields.get(name) for name in loose if fields.get(name) is not None}
    out = {}
    for t in types:
        entry = given.get(t)
        if entry is not None and not isinstance(entry, dict):
            raise fields.fault("rope_parameters", "an object with one object a layer type")
        rest = {**(defaults[t] if entry is None else {}), **beside}
        where = f"{fields.where}: rope_parameters.{t}"
        out[t] = rope(Fields(entry or {}, where), dim, rest)
    return out
