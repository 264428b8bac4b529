"""config.json of a Hugging Face checkpoint -> ModelConfig.

Field meanings and defaults are those of transformers 5.24 (configuration_gemma3.py,
configuration_gemma4.py, configuration_gemma4_unified.py); hub files of Gemma 3 leave most fields
to the defaults. Whatever would change the computation in a way the decoder does not know is
refused by name.
"""

from __future__ import annotations

from typing import Any

from edge_kv.config import FULL, SLIDING, AttentionSpec, ModelConfig, MoESpec
from edge_kv.errors import ConfigError, did_you_mean
from edge_kv.weights.fields import Fields

_TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
_COMMON = {
    **_TOKENS,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131_072,
}
_GEMMA3 = {
    **_COMMON,
    "vocab_size": 262_208,
    "num_hidden_layers": 26,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "sliding_window_pattern": 6,
}
_GEMMA4_DENSE = {
    **_COMMON,
    "vocab_size": 262_144,
    "num_hidden_layers": 30,
    "global_head_dim": 512,
    "num_kv_shared_layers": 0,
    "sliding_window": 1024,
    "max_position_embeddings": 262_144,
    "hidden_size_per_layer_input": 0,
}
_GEMMA4 = {
    **_GEMMA4_DENSE,
    "sliding_window": 512,
    "max_position_embeddings": 131_072,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
}
# text model_type -> (family, defaults)
_TEXT = {
    "gemma3_text": ("gemma3", _GEMMA3),
    "gemma4_text": ("gemma4", _GEMMA4),
    "gemma4_unified_text": ("gemma4", _GEMMA4_DENSE),
}
# multimodal model_type -> model_type of its text_config
_NESTED = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
}
MODEL_TYPES = {*_TEXT, *_NESTED}
_LAYER_TYPES = {"sliding_attention": SLIDING, "full_attention": FULL}
_THETA = {"sliding_attention": 1e4, "full_attention": 1e6}


def config_from_hf(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """The ModelConfig a Hugging Face `config.json` describes.

    Args:
        raw: the parsed file, text-only or multimodal (its `text_config` is used).
        where: what messages call the file.

    Raises:
        ConfigError: an unknown architecture, an unsupported field or a wrong value, by name.
    """
    family, fields = _text_fields(raw, where)
    for level in (Fields(raw, where), fields):
        level.refuse_unless("tie_word_embeddings", True)
        level.refuse_unless("quantization_config")
    fields.refuse_unless("attention_bias", False)
    fields.refuse_unless("attn_logit_softcapping")
    fields.refuse_unless("hidden_activation", "gelu_pytorch_tanh")
    eos = dict.fromkeys((*Fields(raw, where).ids("eos_token_id"), *fields.ids("eos_token_id")))
    build = _gemma3 if family == "gemma3" else _gemma4
    return build(fields, tuple(eos))


def ple_rows(raw: dict[str, Any], where: str = "config.json") -> int:
    """Rows of the per-layer token table, which may be fewer than those of the token table."""
    fields = _text_fields(raw, where)[1]
    rows = fields.integer("vocab_size_per_layer_input")
    if rows < 1:
        raise fields.fault("vocab_size_per_layer_input", "a positive whole number")
    return rows


def _text_fields(raw: dict[str, Any], where: str) -> tuple[str, Fields]:
    """(family, fields) of the text model that `raw` is or contains."""
    kind = str(raw.get("model_type"))
    text = raw
    if kind in _NESTED:
        text = raw.get("text_config")  # type: ignore[assignment]
        if not isinstance(text, dict):
            raise ConfigError(
                f"{where}: model_type {kind!r} has no text_config object; the file is damaged."
            )
        kind = str(text.get("model_type", _NESTED[kind]))
    if kind not in _TEXT:
        raise ConfigError(
            f"{where}: model_type {kind!r} is not supported."
            + did_you_mean(kind, [*_NESTED, *_TEXT])
        )
    family, defaults = _TEXT[kind]
    return family, Fields(text, where, defaults)


def _gemma3(fields: Fields, eos_ids: tuple[int, ...]) -> ModelConfig:
    fields.refuse_unless("use_bidirectional_attention", False)
    n_layers = fields.n_layers("num_hidden_layers")
    scalar = fields.number("query_pre_attn_scalar")
    if scalar <= 0:
        raise fields.fault("query_pre_attn_scalar", "a positive number")
    q_heads, kv_heads = fields.integer("num_attention_heads"), fields.integer("num_key_value_heads")
    dim = fields.integer("head_dim")
    rope = _gemma3_rope(fields)
    sliding = _rope(fields, rope, "sliding_attention", dim)
    full = _rope(fields, rope, "full_attention", dim)
    return _config(
        "gemma3", fields, eos_ids,
        pattern=_pattern(fields, n_layers, fields.integer("sliding_window_pattern")),
        sliding=AttentionSpec(q_heads, kv_heads, dim, *sliding),
        full=AttentionSpec(q_heads, kv_heads, dim, *full),
        attention_scale=scalar**-0.5,
        v_norm=False,
    )  # fmt: skip


def _gemma3_rope(fields: Fields) -> dict[str, dict[str, Any]]:
    """rope_parameters, completed by the older rope_theta / rope_local_base_freq / rope_scaling."""
    rope = _nested_rope(fields)
    scaling = fields.get("rope_scaling")
    if scaling is not None:
        if not isinstance(scaling, dict):
            raise fields.fault("rope_scaling", "an object")
        scaling = {"rope_type" if k == "type" else k: v for k, v in scaling.items()}
        rope["full_attention"].update(scaling)
    for layer_type, key in (
        ("full_attention", "rope_theta"),
        ("sliding_attention", "rope_local_base_freq"),
    ):
        if fields.get(key) is not None:
            rope[layer_type].setdefault("rope_theta", fields.number(key))
    return rope


def _gemma4(fields: Fields, eos_ids: tuple[int, ...]) -> ModelConfig:
    fields.refuse_unless("use_bidirectional_attention", "vision", False)  # text stays causal
    n_layers = fields.n_layers("num_hidden_layers")
    # transformers forces the last layer to full attention, whatever layer_types says.
    pattern = _pattern(fields, n_layers, 6)[:-1] + FULL
    k_eq_v = fields.flag("attention_k_eq_v")
    shape = {
        letter: _heads(fields, pattern, letter, k_eq_v) for letter in (SLIDING, FULL)
    }  # (kv heads, head_dim)
    rope = _nested_rope(fields)
    if fields.get("rope_parameters") is None:
        rope["full_attention"] = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    specs = {}
    for layer_type, letter in _LAYER_TYPES.items():
        kv_heads, dim = shape[letter]
        specs[letter] = AttentionSpec(
            fields.integer("num_attention_heads"), kv_heads, dim,
            *_rope(fields, rope, layer_type, dim), k_eq_v=k_eq_v and letter == FULL,
        )  # fmt: skip
    ple = fields.integer("hidden_size_per_layer_input")
    n_shared = fields.integer("num_kv_shared_layers")
    double = fields.flag("use_double_wide_mlp") and n_shared > 0
    return _config(
        "gemma4", fields, eos_ids,
        pattern=pattern,
        sliding=specs[SLIDING],
        full=specs[FULL],
        n_kv_shared=n_shared,
        shared_mlp_width=2 * fields.integer("intermediate_size") if double else 0,
        ple_dim=ple,
        moe=_moe(fields),
    )  # fmt: skip


def _config(family: str, fields: Fields, eos_ids: tuple[int, ...], **kwargs: Any) -> ModelConfig:
    """Fields that both families spell the same."""
    softcap = fields.get("final_logit_softcapping")
    try:
        return ModelConfig(
            family=family,
            vocab_size=fields.integer("vocab_size"),
            hidden=fields.integer("hidden_size"),
            sliding_window=fields.integer("sliding_window"),
            mlp_width=fields.integer("intermediate_size"),
            max_ctx=fields.integer("max_position_embeddings"),
            final_softcap=0.0 if softcap is None else fields.number("final_logit_softcapping"),
            norm_eps=fields.number("rms_norm_eps"),
            pad_id=fields.integer("pad_token_id"),
            bos_id=fields.integer("bos_token_id"),
            eos_ids=eos_ids,
            **kwargs,
        )
    except ConfigError as e:
        raise ConfigError(str(e) if fields.where in str(e) else f"{fields.where}: {e}") from None


def _pattern(fields: Fields, n_layers: int, period: int) -> str:
    """`layer_types` as letters; without it every `period`-th layer is full."""
    types = fields.get("layer_types")
    if types is None:
        if period < 1:
            raise fields.fault("sliding_window_pattern", "a positive whole number")
        return "".join(SLIDING if (i + 1) % period else FULL for i in range(n_layers))
    if not isinstance(types, list) or len(types) != n_layers:
        raise fields.fault("layer_types", f"a list of {n_layers} layer types")
    for t in types:
        if not isinstance(t, str) or t not in _LAYER_TYPES:
            raise fields.unsupported("layer_types", t, " and ".join(_LAYER_TYPES))
    return "".join(_LAYER_TYPES[t] for t in types)


def _heads(fields: Fields, pattern: str, letter: str, k_eq_v: bool) -> tuple[int, int]:
    """KV heads and head_dim of the layers of one type, from either style of config.

    Hub files have global_head_dim / num_global_key_value_heads (the latter counts only with
    attention_k_eq_v); transformers 5.24 saves `per_layer_config: {"4": {"head_dim": 512}, …}`.
    """
    base = (fields.integer("num_key_value_heads"), fields.integer("head_dim"))
    overrides = fields.get("per_layer_config")
    if overrides is None:
        if letter == SLIDING:
            return base
        few = fields.get("num_global_key_value_heads") is not None and k_eq_v
        kv_heads = fields.integer("num_global_key_value_heads") if few else base[0]
        return kv_heads, fields.integer("global_head_dim")
    if not isinstance(overrides, dict):
        raise fields.fault("per_layer_config", "an object with one object a layer")
    found = set()
    for i in (i for i, kind in enumerate(pattern) if kind == letter):
        override = overrides.get(str(i)) or {}
        if not isinstance(override, dict):
            raise fields.fault("per_layer_config", "an object with one object a layer")
        layer = Fields(override, f"{fields.where}: per_layer_config[{i}]",
                       {"num_key_value_heads": base[0], "head_dim": base[1]})  # fmt: skip
        for key in layer.values:
            if key not in ("num_key_value_heads", "head_dim"):
                raise layer.unsupported(key, layer.get(key), "num_key_value_heads and head_dim")
        found.add((layer.integer("num_key_value_heads"), layer.integer("head_dim")))
    if len(found) > 1:
        raise fields.unsupported(
            "per_layer_config", sorted(found), "one (KV heads, head_dim) for each layer type"
        )
    return found.pop() if found else base


def _nested_rope(fields: Fields) -> dict[str, dict[str, Any]]:
    """A copy of `rope_parameters`, with an entry for each layer type."""
    given = fields.get("rope_parameters")
    if given is None:
        given = {}
    if not isinstance(given, dict) or set(given) - set(_LAYER_TYPES):
        raise fields.fault("rope_parameters", "an object with " + " and ".join(_LAYER_TYPES))
    nested = {t: given.get(t) or {} for t in _LAYER_TYPES}
    if not all(isinstance(entry, dict) for entry in nested.values()):
        raise fields.fault("rope_parameters", "an object with one object a layer type")
    return {t: dict(entry) for t, entry in nested.items()}


def _rope(
    fields: Fields, rope: dict[str, dict[str, Any]], layer_type: str, head_dim: int
) -> tuple[float, int, float]:
    """(theta, rotated pairs, factor) of one layer type."""
    where = f"{fields.where}: rope_parameters.{layer_type}"
    entry = Fields(
        rope[layer_type],
        where,
        {"rope_type": "default", "rope_theta": _THETA[layer_type], "factor": 1.0,
         "partial_rotary_factor": 1.0},
    )  # fmt: skip
    kind = entry.get("rope_type")
    if kind not in ("default", "linear", "proportional"):
        raise entry.unsupported("rope_type", kind, "default, linear and proportional")
    theta, factor = entry.number("rope_theta"), entry.number("factor")
    if theta <= 0 or factor <= 0:
        raise entry.fault("rope_theta" if theta <= 0 else "factor", "a positive number")
    share = entry.number("partial_rotary_factor")
    if kind != "proportional":
        entry.refuse_unless("partial_rotary_factor", 1.0)
    if kind == "default":
        factor = 1.0
    # transformers' _compute_proportional_rope_parameters: the exponent keeps the full head_dim.
    return theta, int(share * head_dim // 2), factor


def _moe(fields: Fields) -> MoESpec | None:
    if not fields.flag("enable_moe_block"):
        return None
    return MoESpec(
        fields.integer("num_experts"),
        fields.integer("top_k_experts"),
        fields.integer("moe_intermediate_size"),
    )
