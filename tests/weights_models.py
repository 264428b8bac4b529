"""Tiny Hugging Face models of every supported family, every parameter randomised.

They are the oracles of the checkpoint readers, the decoder and the exported programs. Default
initialisation would hide wiring faults (norms at 1, layer scalars at 1), so each parameter and
buffer is redrawn, at scales that keep activations near 1.
"""

from __future__ import annotations

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)
from transformers.models.gemma4_unified import Gemma4UnifiedForCausalLM, Gemma4UnifiedTextConfig

S, F = "sliding_attention", "full_attention"


def layer_types(pattern: str) -> list[str]:
    """`SSF` -> the Hugging Face spelling."""
    return [S if letter == "S" else F for letter in pattern]


_GEMMA4 = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "max_position_embeddings": 512,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 128,
    "eos_token_id": [1, 106],
}

# name: (pattern, what differs from _GEMMA4)
GEMMA4_ROWS: dict[str, tuple[str, dict[str, object]]] = {
    "e2b": (
        "SSFSSFSF",
        {
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 4,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 32,
        },
    ),
    "e4b": (
        "SSSFSSSFSF",
        {"num_kv_shared_layers": 3, "hidden_size_per_layer_input": 32},
    ),
    "12b": (
        "SSFSSF",
        {"num_global_key_value_heads": 1, "attention_k_eq_v": True},
    ),
    "31b": (
        "SSSFSSF",
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
        },
    ),
    "26b": (
        "SSFSSF",
        {
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 3,
            "moe_intermediate_size": 32,
        },
    ),
}
NAMES = (*GEMMA4_ROWS, "gemma3")


def tiny_config(name: str, **changes: object):
    """Hugging Face text config of a tiny model: 'e2b' 'e4b' '12b' '31b' '26b' 'gemma3'."""
    if name == "gemma3":
        values = {
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "layer_types": layer_types("SSFSSS"),
            "max_position_embeddings": 512,
            "eos_token_id": [1, 106],
            "rope_parameters": {
                S: {"rope_type": "default", "rope_theta": 1e4},
                F: {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
            },
        }
        return Gemma3TextConfig(**{**values, **changes})
    pattern, differs = GEMMA4_ROWS[name]
    types = {"layer_types": layer_types(pattern), "num_hidden_layers": len(pattern)}
    config = Gemma4UnifiedTextConfig if name == "12b" else Gemma4TextConfig
    return config(**{**_GEMMA4, **types, **differs, **changes})


def tiny_hf(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny causal LM in fp32, eval mode, eager attention, every parameter randomised."""
    config = tiny_config(name, **changes)
    config._attn_implementation = "eager"
    kind = {"gemma3": Gemma3ForCausalLM, "12b": Gemma4UnifiedForCausalLM}.get(
        name, Gemma4ForCausalLM
    )
    return randomise(kind(config).float().eval(), seed)


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Redraw every parameter and persistent buffer of a text model in place."""
    generator = torch.Generator().manual_seed(seed)
    plus_one = model.config.model_type.startswith("gemma3")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(_draw(name, noise, plus_one))
    return model


def _draw(name: str, noise: torch.Tensor, plus_one: bool) -> torch.Tensor:
    if "layer_scalar" in name:
        return 1 + 0.1 * noise
    if name.endswith(("router.scale", "per_expert_scale")):
        return 1 + 0.2 * noise
    if "norm" in name:
        # Gemma 4 attends at scale 1: q_norm and k_norm keep the scores near std 1.
        centre = 0.5 if name.endswith(("q_norm.weight", "k_norm.weight")) and not plus_one else 1.0
        return centre * (1 + 0.2 * noise) - (1.0 if plus_one else 0.0)
    return noise / noise.shape[-1] ** 0.5


def canonical_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every parameter under the name of its weight row, taken from the modules themselves."""
    text, config = model.model, model.config
    one = 1.0 if config.model_type.startswith("gemma3") else 0.0  # Gemma3RMSNorm: 1 + weight
    found = {"embed": text.embed_tokens.weight, "norm": text.norm.weight + one}
    ple = getattr(config, "hidden_size_per_layer_input", 0)
    if ple:
        found["ple.embed"] = text.embed_tokens_per_layer.weight
        found["ple.proj"] = text.per_layer_model_projection.weight
        found["ple.norm"] = text.per_layer_projection_norm.weight
    for i, layer in enumerate(text.layers):
        attn, mlp = layer.self_attn, layer.mlp
        rows = {
            "attn_norm": layer.input_layernorm.weight + one,
            "attn.q": attn.q_proj.weight,
            "attn.q_norm": attn.q_norm.weight + one,
            "attn.out": attn.o_proj.weight,
            "attn_out_norm": layer.post_attention_layernorm.weight + one,
            "mlp_norm": layer.pre_feedforward_layernorm.weight + one,
            "mlp.gate": mlp.gate_proj.weight,
            "mlp.up": mlp.up_proj.weight,
            "mlp.down": mlp.down_proj.weight,
            "mlp_out_norm": layer.post_feedforward_layernorm.weight + one,
        }
        if hasattr(attn, "k_proj"):
            rows["attn.k"] = attn.k_proj.weight
            rows["attn.k_norm"] = attn.k_norm.weight + one
            if attn.v_proj is not None:
                rows["attn.v"] = attn.v_proj.weight
        if getattr(config, "enable_moe_block", False):
            rows["moe.dense_norm"] = layer.post_feedforward_layernorm_1.weight
            rows["moe.in_norm"] = layer.pre_feedforward_layernorm_2.weight
            rows["moe.out_norm"] = layer.post_feedforward_layernorm_2.weight
            rows["moe.router_scale"] = layer.router.scale
            rows["moe.router"] = layer.router.proj.weight
            rows["moe.expert_scale"] = layer.router.per_expert_scale
            rows["moe.gate_up"] = layer.experts.gate_up_proj
            rows["moe.down"] = layer.experts.down_proj
        if ple:
            rows["ple.gate"] = layer.per_layer_input_gate.weight
            rows["ple.proj"] = layer.per_layer_projection.weight
            rows["ple.norm"] = layer.post_per_layer_input_norm.weight
        if one == 0.0:
            rows["scalar"] = layer.layer_scalar
        found.update({f"layers.{i}.{name}": value for name, value in rows.items()})
    return {name: value.detach() for name, value in found.items()}
