"""Write a Gemma 4 GGUF of the real size with random weights, for llama.cpp: Q4_0 body and head.

The tensors are those of make_random_checkpoint.py, same seed and values, quantised to Q4_0 as
`llama-quantize` does with Q4_0 for the token embedding too; only the projection of the per-layer
embeddings stays bf16. Streamed: neither a checkpoint nor much memory is needed. The tokenizer is
taken from another GGUF file of the same vocabulary.

    python benchmarks/make_random_gguf.py --model e4b --out e4b-q4_0.gguf \
        --tokenizer gemma-3-270m-q4_k_m.gguf
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import run_main
from gguf import (
    GGML_QUANT_SIZES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
)
from gguf.quants import quantize
from make_random_checkpoint import MODELS, Tensor, make_config, tensors, values

from edge_kv.cli.terminal import Bar

# Hugging Face's part of a name, and llama.cpp's.
NAMES = {
    "embed_tokens": "token_embd",
    "embed_tokens_per_layer": "per_layer_token_embd",
    "per_layer_model_projection": "per_layer_model_proj",
    "per_layer_projection_norm": "per_layer_proj_norm",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_proj": "attn_k",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
    "layer_scalar": "layer_output_scale",
}
NO_ROTATION = 1e30  # divides the frequency of pairs that proportional rope leaves as they are


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
    return f"{block}{NAMES['.'.join(parts[2:] if block else parts)]}.weight"


def storage(tensor: Tensor) -> GGMLQuantizationType:
    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    if tensor.name.endswith("per_layer_model_projection.weight"):
        return GGMLQuantizationType.BF16
    return GGMLQuantizationType.Q4_0


def rope_factors(config: dict[str, Any]) -> np.ndarray:
    """float32 [global_head_dim / 2]: 1 for the pairs that rotate."""
    pairs = config["global_head_dim"] // 2
    rotated = config["rope_parameters"]["full_attention"]["partial_rotary_factor"] * pairs
    return np.where(np.arange(pairs) < rotated, 1.0, NO_ROTATION).astype(np.float32)


def write_facts(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """What llama.cpp's gemma4 reads of the configuration."""
    arch, layers = "gemma4", config["num_hidden_layers"]
    owners = layers - config["num_kv_shared_layers"]
    wide = 2 if config["use_double_wide_mlp"] else 1
    width = config["intermediate_size"]
    rope = config["rope_parameters"]
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(2)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length([width * (wide if i >= owners else 1) for i in range(layers)])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([t == "sliding_attention" for t in config["layer_types"]])
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    writer.add_float32(f"{arch}.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
    for suffix, head in (("", config["global_head_dim"]), ("_swa", config["head_dim"])):
        writer.add_uint32(f"{arch}.attention.key_length{suffix}", head)
        writer.add_uint32(f"{arch}.attention.value_length{suffix}", head)
        writer.add_uint32(f"{arch}.rope.dimension_count{suffix}", head)


def copy_tokenizer(writer: GGUFWriter, source: Path) -> None:
    for name, field in GGUFReader(source).fields.items():
        if name.startswith("tokenizer.ggml."):
            nested = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=nested)


def stored(tensor: Tensor, kind: GGMLQuantizationType, seed: int) -> np.ndarray:
    """The tensor's bytes, quantised a block of values at a time."""
    out = np.empty(nbytes(tensor, kind), np.uint8)
    at = 0
    for part in values(tensor, seed):
        bytes_ = quantize(part.astype(np.float32), kind).view(np.uint8)
        out[at : at + bytes_.size] = bytes_
        at += bytes_.size
    return out


def nbytes(tensor: Tensor, kind: GGMLQuantizationType) -> int:
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(np.prod(tensor.shape)) // per_block * block_bytes


def write_gguf(model: str, out: Path, tokenizer: Path, seed: int) -> None:
    config = make_config(model)
    listed = [(t, storage(t)) for t in tensors(config, dead_kv=False)]
    factors = rope_factors(config)
    writer = GGUFWriter(out, "gemma4")
    writer.add_name(f"{model} with random weights")
    write_facts(writer, config)
    copy_tokenizer(writer, tokenizer)
    floats = np.dtype(np.float32)
    for tensor, kind in listed:
        size = nbytes(tensor, kind)
        writer.add_tensor_info(gguf_name(tensor.name), tensor.shape, floats, size, raw_dtype=kind)
    writer.add_tensor_info("rope_freqs.weight", factors.shape, floats, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total = sum(nbytes(*row) for row in listed)
    done = 0
    with Bar() as bar:
        bar.stage("weights")
        for tensor, kind in listed:
            writer.write_tensor_data(stored(tensor, kind, seed))
            done += nbytes(tensor, kind)
            bar.advance(tensor.name, done, total)
    writer.write_tensor_data(factors)
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="e2b")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a GGUF to take one from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    part = args.out.with_suffix(".part")
    write_gguf(args.model, part, args.tokenizer, args.seed)
    part.replace(args.out)


if __name__ == "__main__":
    run_main(main)
