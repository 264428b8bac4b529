"""Tiny models of every family in transformers, every parameter drawn: oracles of the nets.

Default initialisation would hide wiring faults (norms 1, sinks and temperatures 0, one expert for
every token), so each parameter and buffer is redrawn at scales that keep activations near 1.
"""

from __future__ import annotations

import math

import torch
import transformers as hf
from weights_models import NAMES as GEMMA
from weights_models import tiny_hf

FULL, SLIDING = "full_attention", "sliding_attention"
SPARSE, DENSE = "compressed_sparse_attention", "heavily_compressed_attention"
_COMMON = {
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DECODER = {
    **_COMMON,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LAGUNA = {
    **_COMMON,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": [FULL, *[SLIDING] * 3] * 2,
    "sliding_window": 8,
    "num_attention_heads_per_layer": [6, 8, 8, 8] * 2,
    "mlp_layer_types": ["dense", *["sparse"] * 7],
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_routed_scaling_factor": 2.5,
    "rope_parameters": {
        FULL: {
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 64.0,
            "beta_slow": 1.0,
            "attention_factor": 1.25,
            "partial_rotary_factor": 0.5,
        },
        SLIDING: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    },
}
_ZAYA = {
    **_COMMON,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 5,
    "moe_intermediate_size": 32,
    "router_hidden_size": 16,
}
_V4 = {
    **_COMMON,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "head_dim": 32,
    "q_lora_rank": 24,
    "num_experts_per_tok": 3,
    "n_routed_experts": 8,
    "layer_types": [SLIDING, SLIDING, *[SPARSE, DENSE] * 2],
    "compress_rates": {SPARSE: 4, DENSE: 16},
    "mlp_layer_types": [*["hash_moe"] * 3, *["moe"] * 3],
    "swiglu_limit": 0.5,
    "sliding_window": 8,
    "o_groups": 2,
    "o_lora_rank": 16,
    "index_n_heads": 16,  # few heads give scores of exactly 0, whose order is left to chance
    "index_head_dim": 16,
    "index_topk": 3,
    "partial_rotary_factor": 0.25,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}

# name: (config class, model class, fields)
ROWS = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {**_DECODER, "tie_word_embeddings": True}),
    "llama-bias": (
        hf.LlamaConfig,
        hf.LlamaForCausalLM,
        {**_DECODER, "attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3},
    ),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {**_DECODER, "tie_word_embeddings": True}),
    "qwen3": (  # whole blocks: what reads the residual can be packed
        hf.Qwen3Config,
        hf.Qwen3ForCausalLM,
        {**_DECODER, "attention_bias": True, "hidden_size": 64},
    ),
    "laguna": (hf.LagunaConfig, hf.LagunaForCausalLM, {**_LAGUNA, "gating": True}),
    "laguna-element": (
        hf.LagunaConfig,
        hf.LagunaForCausalLM,
        {**_LAGUNA, "gating": "per-element", "moe_router_logit_softcapping": 2.0},
    ),
    "zaya": (hf.ZayaConfig, hf.ZayaForCausalLM, _ZAYA),
    "zaya-sliding": (
        hf.ZayaConfig,
        hf.ZayaForCausalLM,
        {**_ZAYA, "layer_types": ["hybrid", "hybrid_sliding"] * 2, "sliding_window": 8},
    ),
    "deepseek_v4": (hf.DeepseekV4Config, hf.DeepseekV4ForCausalLM, _V4),
}
NAMES = (*GEMMA, *ROWS)
# Windows of 8 beside blocks of 4 and of 16 positions, and beside convolutions over 2: the fewest
# layers that have them.
FEWEST = {
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, SPARSE, DENSE],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    "zaya-sliding": {"num_hidden_layers": 2, "layer_types": ["hybrid", "hybrid_sliding"]},
}


def tiny(name: str, seed: int = 0, **changes: object) -> hf.PreTrainedModel:
    """The tiny model `name` in f32, eval mode, eager attention.

    `changes` are fields of its config, for rows of ROWS.
    """
    if name in GEMMA:
        return tiny_hf(name, seed, eos_token_id=[1, 2])
    config, model, fields = ROWS[name]
    fields = fields | changes
    made = model(config(**fields, attn_implementation="eager")).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in made.state_dict().items():
            tensor.copy_(_draw(key, tensor, generator, fields))
    return made


def _draw(
    key: str, tensor: torch.Tensor, generator: torch.Generator, fields: dict[str, object]
) -> torch.Tensor:
    if not tensor.is_floating_point():  # experts by token id, distinct
        experts = range(tensor.shape[0])
        top = int(fields["n_routed_experts"])
        drawn = [torch.randperm(top, generator=generator)[: tensor.shape[1]] for _ in experts]
        return torch.stack(drawn)
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim < 2:
        around_one = any(word in key for word in ("norm", "scale", "temp"))
        return 1 + 0.2 * noise if around_one else 0.3 * noise
    return noise / math.sqrt(tensor[0].numel() if "conv" in key else tensor.shape[-1])
