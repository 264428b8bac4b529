"""config.json and GGUF metadata -> config of Gemma: every style read, all else refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
from weights_gguf import write_gguf
from weights_models import NAMES, layer_types, tiny_config, tiny_hf

from edge_kv import models
from edge_kv.errors import ConfigError
from edge_kv.models.checkpoint import config_from_hf, open_checkpoint
from edge_kv.models.gemma import Attention, MoE, gemma3, gemma4
from edge_kv.models.model import Rope

EXPECTED = {
    "e2b": gemma4(
        vocab=128,
        hidden=64,
        layers=8,
        pattern="SSFSSFSF",
        window=8,
        sliding=Attention(4, 1, 16, Rope.whole(1e4, 16)),
        full=Attention(4, 1, 32, Rope(1e6, 32, 4)),
        mlp_width=96,
        shared_mlp_width=192,
        max_ctx=512,
        shared=4,
        ple_dim=32,
        softcap=30.0,
        eos_ids=(1, 106),
    )
}
EXPECTED["e4b"] = replace(
    EXPECTED["e2b"],
    layers=10,
    pattern="SSSFSSSFSF",
    sliding=Attention(4, 2, 16, Rope.whole(1e4, 16)),
    full=Attention(4, 2, 32, Rope(1e6, 32, 4)),
    shared_mlp_width=0,
    shared=3,
)
EXPECTED["12b"] = replace(
    EXPECTED["e4b"],
    layers=6,
    pattern="SSFSSF",
    full=Attention(4, 1, 32, Rope(1e6, 32, 4), k_eq_v=True),
    shared=0,
    ple_dim=0,
)
EXPECTED["26b"] = replace(EXPECTED["12b"], moe=MoE(8, 3, 32))
EXPECTED["31b"] = replace(
    EXPECTED["12b"],
    layers=7,
    pattern="SSSFSSF",
    sliding=Attention(8, 4, 16, Rope.whole(1e4, 16)),
    full=Attention(8, 2, 32, Rope(1e6, 32, 4), k_eq_v=True),
)
EXPECTED["gemma3"] = gemma3(
    vocab=128,
    hidden=64,
    layers=6,
    pattern="SSFSSS",
    window=8,
    sliding=Attention(4, 1, 32, Rope.whole(1e4, 32)),
    full=Attention(4, 1, 32, Rope(1e6, 32, 16, factor=4.0)),
    mlp_width=128,
    max_ctx=512,
    attention_scale=24**-0.5,
    eos_ids=(1, 106),
)


def saved(name: str) -> dict:
    """config.json as transformers writes it."""
    return json.loads(tiny_config(name).to_json_string())


def hub_style(name: str) -> dict:
    """The same config with global_head_dim / num_global_key_value_heads, as on the hub."""
    raw = saved(name)
    full = raw.pop("per_layer_config")[str(raw["layer_types"].index("full_attention"))]
    raw["global_head_dim"] = full["head_dim"]
    raw["num_global_key_value_heads"] = full.get("num_key_value_heads")
    return raw


@pytest.mark.parametrize("name", NAMES)
def test_saved_by_transformers(name):
    assert config_from_hf(saved(name)) == EXPECTED[name]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "gemma3"])
def test_hub_style_says_the_same(name):
    assert config_from_hf(hub_style(name)) == EXPECTED[name]


@pytest.mark.parametrize("name", NAMES)
def test_multimodal_nesting(name):
    text = saved(name)
    text |= {"eos_token_id": 1, "tie_word_embeddings": False}  # transformers asks the outer one
    outer = {"model_type": text["model_type"].removesuffix("_text"), "text_config": text,
             "vision_config": {"hidden_size": 1}, "eos_token_id": [1, 106]}  # fmt: skip
    assert config_from_hf(outer) == EXPECTED[name]


@pytest.mark.parametrize("name", NAMES)
def test_gguf_metadata(name, tmp_path):
    source = open_checkpoint(write_gguf(tmp_path / "m.gguf", tiny_hf(name)))
    want = replace(EXPECTED[name], eos_ids=(1,))
    if name == "gemma3":  # GGUF has no query_pre_attn_scalar: llama.cpp's rule is head_dim
        want = replace(want, attention_scale=32**-0.5)
    assert source.config == want


def test_gemma3_older_fields_and_sparse_text_config():
    """gemma-3-4b style: most fields left to defaults, rope as rope_scaling beside thetas."""
    config = config_from_hf(
        {
            "model_type": "gemma3",
            "eos_token_id": [1, 106],
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        }
    )
    assert config.pattern == ("SSSSSF" * 6)[:34]
    assert config.full == Attention(8, 4, 256, Rope(1e6, 256, 128, factor=8.0))
    assert config.sliding == Attention(8, 4, 256, Rope.whole(1e4, 256))
    assert (config.vocab, config.max_ctx) == (262_208, 131_072)
    assert config.attention_scale == 256**-0.5


def test_gemma3_270m_text_only_hub_file_is_the_preset():
    raw = {
        "model_type": "gemma3_text", "vocab_size": 262_144, "hidden_size": 640,
        "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 512, "_sliding_window_pattern": 6, "max_position_embeddings": 32_768,
        "layer_types": layer_types("SSSSSF" * 3), "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "rope_scaling": None, "eos_token_id": [1, 106], "use_bidirectional_attention": False,
    }  # fmt: skip
    assert config_from_hf(raw) == models.get_row("gemma3-270m").config


@pytest.mark.parametrize("name", ["e2b", "e4b", "12b", "26b-a4b", "31b"])
def test_presets_are_what_transformers_would_save(name):
    """A preset written in Hugging Face words at full size reads back as itself."""
    config = models.get_row(name).config
    kind = "gemma4_unified_text" if name == "12b" else "gemma4_text"
    raw = {
        "model_type": kind, "vocab_size": config.vocab, "hidden_size": config.hidden,
        "intermediate_size": config.mlp_width, "num_hidden_layers": config.layers,
        "num_attention_heads": config.sliding.q_heads, "head_dim": 256, "global_head_dim": 512,
        "num_key_value_heads": config.sliding.kv_heads,
        "num_global_key_value_heads": config.full.kv_heads if config.full.k_eq_v else None,
        "sliding_window": config.window, "layer_types": layer_types(config.pattern),
        "max_position_embeddings": config.max_ctx, "final_logit_softcapping": 30.0,
        "attention_k_eq_v": config.full.k_eq_v, "num_kv_shared_layers": config.shared,
        "use_double_wide_mlp": config.shared_mlp_width > 0, "eos_token_id": [1, 106],
        "hidden_size_per_layer_input": config.ple_dim,
        "enable_moe_block": config.moe is not None, "num_experts": 128, "top_k_experts": 8,
        "moe_intermediate_size": 704,
    }  # fmt: skip
    assert config_from_hf(raw) == config


def test_a_head_of_its_own_is_read():
    config = config_from_hf(saved("31b") | {"tie_word_embeddings": False})
    assert config == replace(EXPECTED["31b"], tied=False)
    assert models.weights(config)[-1].name == "head"


def test_last_layer_is_forced_to_full_as_in_transformers():
    raw = hub_style("31b")
    raw["layer_types"][-1] = "sliding_attention"
    assert config_from_hf(raw) == EXPECTED["31b"]


BAD = [
    ("e2b", {"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    ("e2b", {"model_type": "gemma4_txt"}, "Did you mean 'gemma4_text'"),
    ("e2b", {"model_type": None}, "model_type None is not supported"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
    ("e4b", {"attention_bias": True}, "attention_bias = true is not supported"),
    ("e4b", {"hidden_activation": "silu"}, "hidden_activation = 'silu' is not supported"),
    ("31b", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all'"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = true"),
    ("31b", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("31b", {"tie_word_embeddings": 0}, "tie_word_embeddings is 0, expected true or false"),
    ("e2b", {"layer_types": ["sliding_attention"]}, "expected a list of 8 layer types"),
    ("e2b", {"layer_types": [*layer_types("SSFSSFSF")[:-1], "linear_attention"]},
     "layer_types = 'linear_attention' is not supported"),
    ("e2b", {"hidden_size": "64"}, "hidden_size is '64', expected a whole number"),
    ("e2b", {"num_hidden_layers": 0}, "expected a whole number from 1 to 1000"),
    ("e2b", {"num_kv_shared_layers": 7}, "have no owner to read from"),
    ("e2b", {"num_attention_heads": 0}, "must be a positive multiple"),
    ("31b", {"num_attention_heads": 6}, "must be a positive multiple of kv_heads"),
    ("e2b", {"eos_token_id": "x"}, "expected a token id or a list of token ids"),
    ("31b", {"per_layer_config": {"3": {"sliding_window": 4}}}, "sliding_window = 4"),
    ("31b", {"per_layer_config": {"3": {"head_dim": 64}}}, "one (KV heads, head_dim) for each"),
    ("gemma3", {"per_layer_config": {"1": {"skip": ["mlp"]}}}, "per_layer_config = {"),
    ("26b", {"num_experts": None}, "num_experts is absent, expected a whole number"),
    ("gemma3", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters is"),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4}}},
     "rope_type = 'yarn' is not supported; edge-kv supports default, linear and proportional"),
    ("gemma3", {"rope_parameters": {"full_attention": 3}}, "one object a layer type"),
    ("e2b", {"num_hidden_layers": 10**30, "layer_types": None}, "from 1 to 1000"),
    ("gemma3", {"query_pre_attn_scalar": 0}, "expected a positive number"),
    ("e2b", {"rms_norm_eps": 0}, "norm_eps 0 must be positive"),
    ("e2b", {"rms_norm_eps": -1e-6}, "norm_eps -1e-06 must be positive"),
    ("gemma3", {"rms_norm_eps": float("nan")}, "expected a finite number"),
    ("gemma3", {"rms_norm_eps": 10**400}, "expected a finite number"),
    ("26b", {"top_k_experts": 9}, "top_k 9 must be from 1 to the 8 experts"),
    ("26b", {"top_k_experts": 0}, "top_k 0 must be from 1 to the 8 experts"),
    ("26b", {"num_experts": 0}, "0 experts of width 32 must be positive"),
    ("26b", {"moe_intermediate_size": -32}, "8 experts of width -32 must be positive"),
    ("e2b", {"bos_token_id": 128}, "bos_id 128 is not a token id below the vocabulary's 128"),
    ("e2b", {"eos_token_id": [1, -2]}, "eos_ids[1] -2 is not a token id below"),
    ("gemma3", {"pad_token_id": -1}, "pad_id -1 is not a token id below"),
    ("e2b", {"hidden_size_per_layer_input": -32}, "ple_dim -32 must not be negative"),
    ("31b", {"final_logit_softcapping": -30.0}, "expected a number above 0"),
    ("gemma3", {"final_logit_softcapping": 0.0}, "expected a number above 0"),
    ("31b", {"is_causal": False}, "is_causal = false is not supported"),
    ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "a positive number"),
    ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": -8.0}}, "a positive number"),
    ("gemma3", {"rope_scaling": {"type": "linear", "factor": float("nan")}}, "a finite number"),
]  # fmt: skip


@pytest.mark.parametrize("name, change, message", BAD)
def test_refused_by_name(name, change, message):
    raw = copy.deepcopy(saved(name)) | change
    with pytest.raises(ConfigError) as error:
        config_from_hf(raw, "here/config.json")
    assert message in str(error.value)
    assert "here/config.json" in str(error.value)


ODD = [[], {}, -1, 0, 3, 10**30, "x", 1e300, float("nan"), float("inf"), True, [[1]], {"3": 4}]


@pytest.mark.parametrize("name", ["26b", "e2b", "gemma3"])
def test_odd_values_never_escape_as_other_errors(name):
    raw = saved(name)
    for key in raw:
        for odd in ODD:
            try:
                config_from_hf(raw | {key: odd})
            except ConfigError as error:
                assert "config.json" in str(error)


def test_multimodal_without_text_config_is_refused():
    with pytest.raises(ConfigError, match="no text_config"):
        config_from_hf({"model_type": "gemma4", "vision_config": {}})


BAD_GGUF = [
    ("e2b", {"gemma4.rope.scaling.type": "yarn"}, "gemma4.rope.scaling.type = 'yarn'"),
    ("e2b", {"gemma4.attention.causal": False}, "gemma4.attention.causal = false"),
    ("e2b", {"gemma4.rope.dimension_count_swa": 4}, "gemma4.rope.dimension_count_swa = 4"),
    ("e2b", {"gemma4.attention.value_length": 8}, "gemma4.attention.value_length = 8"),
    ("e2b", {"gemma4.attention.sliding_window_pattern": None}, "a flag for each layer"),
    ("e2b", {"gemma4.attention.head_count_kv": [1, 2, 1, 1, 1, 1, 1, 1]}, "= [1, 2] is not"),
    ("e2b", {"gemma4.block_count": 0}, "gemma4.block_count is 0"),
    ("e2b", {"gemma4.embedding_length": None}, "gemma4.embedding_length is absent"),
    ("e2b", {"gemma4.attention.key_length": 64, "gemma4.attention.value_length": 64,
             "gemma4.rope.dimension_count": 64}, "rope_freqs.weight is (16,), expected 32"),
    ("e2b", {"gemma4.rope.freq_base": None}, "rope.freq_base is absent, expected a finite"),
    ("gemma3", {"gemma3.rope.freq_base": -1.0}, "gemma3.rope.freq_base is -1.0"),
    ("gemma3", {"general.architecture": "gemma2"}, "general.architecture 'gemma2'"),
    ("gemma3", {"general.architecture": "clip"}, "is the vision or audio projector of a model"),
    ("gemma3", {"gemma3.rope.scaling.factor": -2.0}, "expected a number from 0"),
    ("gemma3", {"gemma3.rope.scaling.factor": float("nan")}, "expected a finite number"),
    ("gemma3", {"gemma3.attention.layer_norm_rms_epsilon": 0.0}, "norm_eps 0 must be"),
    ("gemma3", {"gemma3.attention.key_length": 0}, "key_length is 0, expected a whole"),
    ("gemma3", {"gemma3.attention.head_count": 0}, "must be a positive multiple"),
    ("gemma3", {"tokenizer.ggml.eos_token_id": 128}, "eos_ids[0] 128 is not a token id below"),
    ("26b", {"gemma4.expert_used_count": 9}, "top_k 9 must be from 1 to the 8 experts"),
]  # fmt: skip


@pytest.mark.parametrize("name, change, message", BAD_GGUF)
def test_gguf_refused_by_name(name, change, message, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_hf(name), metadata=change)
    with pytest.raises(ConfigError) as error:
        open_checkpoint(path)
    assert message in str(error.value)
    assert "m.gguf" in str(error.value)


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({"gemma3.rope.scaling.factor": 0.0}, 1.0),
        ({"gemma3.rope.scaling.type": "none"}, 1.0),
        ({"gemma3.rope.scaling.factor": None, "gemma3.rope.scale_linear": 8.0}, 8.0),
        ({"gemma3.rope.scaling.factor": None}, 1.0),
    ],
)
def test_gguf_rope_factor_is_read_as_llama_cpp_does(change, factor, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_hf("gemma3"), metadata=change)
    config = open_checkpoint(path).config
    assert (config.full.rope.factor, config.sliding.rope.factor) == (factor, 1.0)
