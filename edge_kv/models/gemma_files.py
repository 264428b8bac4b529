"""How checkpoints describe Gemma 3 and Gemma 4: config.json of Hugging Face, metadata of GGUF.

Field meanings and defaults of config.json are those of transformers 5.24 (configuration_gemma3.py,
configuration_gemma4.py, configuration_gemma4_unified.py); hub files of Gemma 3 leave most fields to
the defaults. Keys of GGUF are those that llama.cpp's converter writes and its loader reads
(conversion/gemma.py, src/models/gemma3.cpp and gemma4.cpp). Whatever would change the computation
in a way the net does not know is refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_kv.errors import ConfigError, did_you_mean
from edge_kv.models import reading
from edge_kv.models.gemma import FULL, SLIDING, Attention, Config, MoE, gemma3, gemma4
from edge_kv.models.model import Rope
from edge_kv.weights.fields import Fields
from edge_kv.weights.gguf_tokenizer import default_ids
from edge_kv.weights.source import Stored

if TYPE_CHECKING:
    from edge_kv.weights.gguf_file import GGUFFile

_COMMON = {
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
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
# text model_type -> defaults
_TEXT = {
    "gemma3_text": _GEMMA3,
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4_DENSE,
}
# multimodal model_type -> model_type of its text_config
_NESTED = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
}
_LAYER_TYPES = {"sliding_attention": SLIDING, "full_attention": FULL}
_THETA = {"sliding_attention": 1e4, "full_attention": 1e6}

_ROPE_FREQS = "rope_freqs.weight"
_UNROTATED = 1e29  # llama.cpp divides the angles of unrotated pairs by 1e30
_LAYERS_OF_27B = 62
_GEMMA4_SOFTCAP = 30.0  # llama.cpp's, where a file says none


# --- Hugging Face -------------------------------------------------------------------------------


def read_hf(raw: dict[str, Any], where: str) -> Config:
    """The config that a config.json describes, text-only or multimodal."""
    kind, fields = _text_fields(raw, where)
    outer = Fields(raw, where, {"tie_word_embeddings": True})
    for level in (outer, fields):
        level.refuse_unless("quantization_config")
    fields.refuse_unless("attention_bias", False)
    fields.refuse_unless("attn_logit_softcapping")
    fields.refuse_unless("hidden_activation", "gelu_pytorch_tanh")
    build = _hf_gemma3 if _TEXT[kind] is _GEMMA3 else _hf_gemma4
    return build(
        fields,
        vocab=fields.integer("vocab_size"),
        hidden=fields.integer("hidden_size"),
        layers=fields.n_layers("num_hidden_layers"),
        window=fields.integer("sliding_window"),
        mlp_width=fields.integer("intermediate_size"),
        max_ctx=fields.integer("max_position_embeddings"),
        softcap=fields.positive("final_logit_softcapping") or 0.0,
        norm_eps=fields.number("rms_norm_eps"),
        pad_id=fields.integer("pad_token_id"),
        bos_id=fields.integer("bos_token_id"),
        eos_ids=tuple(dict.fromkeys((*outer.ids("eos_token_id"), *fields.ids("eos_token_id")))),
        tied=outer.flag("tie_word_embeddings"),
    )


def _text_fields(raw: dict[str, Any], where: str) -> tuple[str, Fields]:
    """(model_type, fields) of the text model that `raw` is or contains."""
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
    return kind, Fields(text, where, _TEXT[kind])


def _hf_gemma3(fields: Fields, **common: Any) -> Config:
    fields.refuse_unless("use_bidirectional_attention", False)
    fields.refuse_unless("per_layer_config", {})
    scalar = fields.number("query_pre_attn_scalar")
    if scalar <= 0:
        raise fields.fault("query_pre_attn_scalar", "a positive number")
    heads = fields.integer("num_attention_heads"), fields.integer("num_key_value_heads")
    dim, rope = fields.integer("head_dim"), _gemma3_ropes(fields)
    return gemma3(
        **common,
        pattern=_hf_pattern(fields, fields.integer("sliding_window_pattern")),
        sliding=Attention(*heads, dim, _hf_rope(fields, rope, "sliding_attention", dim)),
        full=Attention(*heads, dim, _hf_rope(fields, rope, "full_attention", dim)),
        attention_scale=scalar**-0.5,
        norm_offset=1.0,
    )


def _gemma3_ropes(fields: Fields) -> dict[str, dict[str, Any]]:
    """rope_parameters, completed by the older rope_theta / rope_local_base_freq / rope_scaling."""
    rope = _nested_ropes(fields)
    if fields.get("rope_parameters") is None:  # then the older name of rope_type says nothing
        rope = {layer_type: {"rope_type": "default"} for layer_type in rope}
    scaling = fields.get("rope_scaling")
    if scaling is not None:
        if not isinstance(scaling, dict):
            raise fields.fault("rope_scaling", "an object")
        rope["full_attention"].update(scaling)
    for layer_type, key in (
        ("full_attention", "rope_theta"),
        ("sliding_attention", "rope_local_base_freq"),
    ):
        if fields.get(key) is not None:
            rope[layer_type].setdefault("rope_theta", fields.number(key))
    return rope


def _hf_gemma4(fields: Fields, **common: Any) -> Config:
    fields.refuse_unless("use_bidirectional_attention", "vision", False)  # text stays causal
    # transformers forces the last layer to full attention, whatever layer_types says.
    pattern = _hf_pattern(fields, 6)[:-1] + FULL
    k_eq_v = fields.flag("attention_k_eq_v")
    rope = _nested_ropes(fields)
    if fields.get("rope_parameters") is None:
        rope["full_attention"] = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    q_heads, kinds = fields.integer("num_attention_heads"), {}
    for layer_type, letter in _LAYER_TYPES.items():
        kv_heads, dim = _hf_heads(fields, pattern, letter, k_eq_v)
        turned = _hf_rope(fields, rope, layer_type, dim)
        kinds[letter] = Attention(q_heads, kv_heads, dim, turned, k_eq_v and letter == FULL)
    shared = fields.integer("num_kv_shared_layers")
    double = fields.flag("use_double_wide_mlp") and shared > 0
    ple = fields.integer("hidden_size_per_layer_input")
    return gemma4(
        **common,
        pattern=pattern,
        sliding=kinds[SLIDING],
        full=kinds[FULL],
        shared=shared,
        shared_mlp_width=2 * fields.integer("intermediate_size") if double else 0,
        ple_dim=ple,
        ple_rows=_hf_ple_rows(fields) if ple else 0,
        moe=_hf_moe(fields),
    )


def _hf_ple_rows(fields: Fields) -> int:
    rows = fields.integer("vocab_size_per_layer_input")
    if rows < 1:
        raise fields.fault("vocab_size_per_layer_input", "a positive whole number")
    return rows


def _hf_pattern(fields: Fields, period: int) -> str:
    """`layer_types` as letters; without it every `period`-th layer is full."""
    types, n = fields.get("layer_types"), fields.n_layers("num_hidden_layers")
    if types is None:
        if period < 1:
            raise fields.fault("sliding_window_pattern", "a positive whole number")
        return "".join(SLIDING if (i + 1) % period else FULL for i in range(n))
    if not isinstance(types, list) or len(types) != n:
        raise fields.fault("layer_types", f"a list of {n} layer types")
    for t in types:
        if not isinstance(t, str) or t not in _LAYER_TYPES:
            raise fields.unsupported("layer_types", t, " and ".join(_LAYER_TYPES))
    return "".join(_LAYER_TYPES[t] for t in types)


def _hf_heads(fields: Fields, pattern: str, letter: str, k_eq_v: bool) -> tuple[int, int]:
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


def _nested_ropes(fields: Fields) -> dict[str, dict[str, Any]]:
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


def _hf_rope(
    fields: Fields, ropes: dict[str, dict[str, Any]], layer_type: str, head_dim: int
) -> Rope:
    """The rotary embedding of one layer type."""
    entry = Fields(
        ropes[layer_type],
        f"{fields.where}: rope_parameters.{layer_type}",
        {"rope_type": ropes[layer_type].get("type", "default"), "rope_theta": _THETA[layer_type],
         "factor": 1.0, "partial_rotary_factor": 1.0},
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
    # transformers' _compute_proportional_rope_parameters: the exponent keeps the full head_dim.
    pairs = int(share * head_dim // 2)
    return Rope(theta, head_dim, pairs, 1.0 if kind == "default" else factor)


def _hf_moe(fields: Fields) -> MoE | None:
    if not fields.flag("enable_moe_block"):
        return None
    return MoE(
        fields.integer("num_experts"),
        fields.integer("top_k_experts"),
        fields.integer("moe_intermediate_size"),
    )


# --- GGUF ---------------------------------------------------------------------------------------


def read_gguf(file: GGUFFile, where: str) -> Config:
    """The config that a GGUF file's metadata and tensors describe."""
    arch = file.metadata["general.architecture"]
    tokens = Fields(file.metadata, where, default_ids(file.metadata), "tokenizer.ggml.")
    defaults = {"rope.freq_base_swa": 1e4}  # llama.cpp's own
    fields = Fields(file.metadata, where, defaults, f"{arch}.")
    fields.refuse_unless("attention.causal", True)
    softcap = fields.get("final_logit_softcapping")
    if softcap is not None:
        softcap = fields.positive("final_logit_softcapping", or_zero=True)
    elif arch == "gemma4":
        softcap = _GEMMA4_SOFTCAP
    build = _gguf_gemma3 if arch == "gemma3" else _gguf_gemma4
    return build(
        fields,
        file.tensors,
        vocab=_vocab(fields, file),
        hidden=fields.integer("embedding_length"),
        layers=fields.n_layers("block_count"),
        window=fields.integer("attention.sliding_window"),
        max_ctx=fields.integer("context_length"),
        softcap=softcap or 0.0,
        # The file holds the nearest f32 of a decimal number.
        norm_eps=float(f"{fields.number('attention.layer_norm_rms_epsilon'):.7g}"),
        pad_id=tokens.integer("padding_token_id"),
        bos_id=tokens.integer("bos_token_id"),
        eos_ids=tokens.ids("eos_token_id"),
    )


def _vocab(fields: Fields, file: GGUFFile) -> int:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        return len(tokens)
    if fields.get("vocab_size") is not None:
        return fields.integer("vocab_size")
    table = file.tensors.get("token_embd.weight")
    return table.shape[0] if table else 0


def _gguf_gemma3(fields: Fields, tensors: dict[str, Stored], **common: Any) -> Config:
    n = common["layers"]
    q_heads = fields.integer("attention.head_count")
    kv_heads = _uniform(fields, "attention.head_count_kv", range(n), n)
    dim = _head_dim(fields, "")
    fields.refuse_unless("rope.dimension_count", dim)
    # llama.cpp's rule: only the 27B scales by hidden / heads instead of head_dim.
    scale_dim = common["hidden"] / q_heads if n == _LAYERS_OF_27B else dim
    sliding = Rope.whole(_theta(fields, "rope.freq_base_swa"), dim)
    full = Rope(_theta(fields, "rope.freq_base"), dim, dim // 2, reading.gguf_rope_factor(fields))
    return gemma3(
        **common,
        pattern=_gguf_pattern(fields, n, 6),
        sliding=Attention(q_heads, kv_heads, dim, sliding),
        full=Attention(q_heads, kv_heads, dim, full),
        mlp_width=_uniform(fields, "feed_forward_length", range(n), n),
        attention_scale=scale_dim**-0.5,
    )


def _gguf_gemma4(fields: Fields, tensors: dict[str, Stored], **common: Any) -> Config:
    n = common["layers"]
    pattern = _gguf_pattern(fields, n, 0)
    given = fields.get("attention.shared_kv_layers")
    shared = 0 if given is None else fields.integer("attention.shared_kv_layers")
    if not 0 <= shared < n:
        raise fields.fault("attention.shared_kv_layers", f"a number below {n}")
    owners, sharers = range(n - shared), range(n - shared, n)
    # The converter writes no flag: a file whose own full layers have no attn_v reuses K as V.
    own_full = [i for i in owners if pattern[i] == FULL]
    k_eq_v = bool(own_full) and not any(f"blk.{i}.attn_v.weight" in tensors for i in own_full)
    kinds = {}
    for letter, suffix in ((SLIDING, "_swa"), (FULL, "")):
        layers = [i for i in range(n) if pattern[i] == letter]
        heads = (
            _uniform(fields, "attention.head_count", layers, n),
            _uniform(fields, "attention.head_count_kv", layers, n),
        )
        dim = _head_dim(fields, suffix)
        fields.refuse_unless(f"rope.dimension_count{suffix}", dim)
        theta = _theta(fields, f"rope.freq_base{suffix}")
        rope = Rope.whole(theta, dim)
        if letter == FULL:
            pairs = _rotated_pairs(fields.where, tensors, dim)
            rope = Rope(theta, dim, pairs, reading.gguf_rope_factor(fields))
        kinds[letter] = Attention(*heads, dim, rope, k_eq_v and letter == FULL)
    mlp = _uniform(fields, "feed_forward_length", owners, n)
    shared_mlp = _uniform(fields, "feed_forward_length", sharers, n) if shared else mlp
    ple = fields.get("embedding_length_per_layer_input")
    return gemma4(
        **common,
        pattern=pattern,
        sliding=kinds[SLIDING],
        full=kinds[FULL],
        mlp_width=mlp,
        shared=shared,
        shared_mlp_width=0 if shared_mlp == mlp else shared_mlp,
        ple_dim=0 if ple is None else fields.integer("embedding_length_per_layer_input"),
        moe=_gguf_moe(fields),
    )


def _gguf_pattern(fields: Fields, n_layers: int, period: int) -> str:
    """A flag for each layer (true: sliding), or a period: every n-th layer is full."""
    key = "attention.sliding_window_pattern"
    flags = fields.get(key)
    if isinstance(flags, list):
        return "".join(SLIDING if f else FULL for f in fields.per_layer(key, n_layers))
    if flags is not None:
        period = fields.integer(key)
    if period < 1:
        raise fields.fault(key, "a flag for each layer")
    return "".join(SLIDING if (i + 1) % period else FULL for i in range(n_layers))


def _uniform(fields: Fields, key: str, layers: range | list[int], n_layers: int) -> int:
    """The value `key` has in all of `layers`; refused by name when they differ."""
    values = fields.per_layer(key, n_layers)
    found = sorted({values[i] for i in layers} or set(values))
    if len(found) > 1:
        raise fields.unsupported(key, found, f"one value for layers {list(layers)}")
    return found[0]


def _head_dim(fields: Fields, suffix: str) -> int:
    dim = fields.integer(f"attention.key_length{suffix}", least=1)
    fields.refuse_unless(f"attention.value_length{suffix}", dim)
    return dim


def _theta(fields: Fields, key: str) -> float:
    theta = fields.number(key)
    if theta <= 0:
        raise fields.fault(key, "a positive number")
    return theta


def _rotated_pairs(where: str, tensors: dict[str, Stored], head_dim: int) -> int:
    """Pairs that turn in full layers: divisors in `rope_freqs.weight` are 1, then 1e30."""
    found = tensors.get(_ROPE_FREQS)
    if found is None or found.shape != (head_dim // 2,):
        raise ConfigError(
            f"{where}: {_ROPE_FREQS} {'is missing' if found is None else f'is {found.shape}'}, "
            f"expected {head_dim // 2} rope divisors; convert it with a current llama.cpp."
        )
    divisors = found.rows(0, head_dim // 2)
    pairs = int((divisors == 1).sum())
    if not ((divisors[:pairs] == 1).all() and (divisors[pairs:] > _UNROTATED).all()):
        raise ConfigError(
            f"{where}: {_ROPE_FREQS} holds other divisors than 1 and 1e30; "
            "edge-kv supports plain and proportional rope."
        )
    return pairs


def _gguf_moe(fields: Fields) -> MoE | None:
    if not fields.get("expert_count"):
        return None
    return MoE(
        fields.integer("expert_count"),
        fields.integer("expert_used_count"),
        fields.integer("expert_feed_forward_length"),
    )
