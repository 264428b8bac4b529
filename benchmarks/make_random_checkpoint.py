"""Write a Gemma 4 checkpoint of the real size with random weights, as a Hugging Face directory.

It stands in for the hub's checkpoint where that cannot be reached: speed and memory measured on it
are real, its text is not. One seed gives the same bytes each time. Memory stays near 200 MB
because tensors are written block by block. Scales are chosen so that activations stay near 1 and
attention is neither uniform nor one-hot: a checkpoint of plain noise would hide numeric errors.
Names and shapes are spelled out here rather than taken from edge_kv, which they help to check.

    python benchmarks/make_random_checkpoint.py --model e2b --out /tmp/e2b-hf \
        --tokenizer gemma-3-270m-q4_k_m.gguf

With `--mobile` it has the form of the release for phones, trained for few bits: integers of 2, 4
and 8 bits with one scale a row, and fixed steps for the inputs and outputs of every product.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import ml_dtypes
import numpy as np

COMMON: dict[str, Any] = {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "dtype": "bfloat16",
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "num_attention_heads": 8,
    "head_dim": 256,
    "global_head_dim": 512,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "sliding_window": 512,
    "max_position_embeddings": 131072,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
        },
    },
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
}
LAYER_TYPES = {"S": "sliding_attention", "F": "full_attention"}
MODELS: dict[str, dict[str, Any]] = {
    "e2b": {
        "layer_types": "SSSSF" * 7,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "use_double_wide_mlp": True,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
    },
    "e4b": {
        "layer_types": "SSSSSF" * 7,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "use_double_wide_mlp": False,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
    },
}
SHARD_BYTES = 2_000_000_000  # a larger tensor gets a shard of its own: the PLE table is 4.7 GB
BLOCK = 1 << 23  # values drawn at a time


# Integers of the mobile release: bits of the modules whose names a pattern is found in.
MOBILE: dict[str, int] = {
    r"lm_head|embed_tokens$": 2,
    r"layers\.(1[5-9]|2\d|3\d)\.mlp": 2,
    r"per_layer_input_gate|per_layer_projection$": 8,
}
OTHERS = 4  # bits
ACTIVATION_STEP = 6 / 127  # activations are near 1


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    std: float = 0.0
    mean: float = 0.0
    dtype: str = "BF16"
    bits: int = 0  # of uniform integers, lowest bits of a byte first; 0: a normal distribution

    @property
    def nbytes(self) -> int:
        return {"BF16": 2, "F32": 4}.get(self.dtype, 1) * int(np.prod(self.shape))


def make_config(model: str) -> dict[str, Any]:
    row = MODELS[model]
    types = [LAYER_TYPES[letter] for letter in row["layer_types"]]
    return COMMON | row | {"layer_types": types, "num_hidden_layers": len(types)}


def tensors(config: dict[str, Any], dead_kv: bool) -> Iterator[Tensor]:
    """Every tensor of the checkpoint, named and shaped as on the hub, with its distribution."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers, ple = config["num_hidden_layers"], config["hidden_size_per_layer_input"]
    owners = layers - config["num_kv_shared_layers"]

    def linear(name: str, rows: int, cols: int) -> Tensor:
        return Tensor(f"model.{name}.weight", (rows, cols), std=cols**-0.5)

    def norm(name: str, size: int, mean: float = 1.0) -> Tensor:
        return Tensor(f"model.{name}.weight", (size,), std=0.05 * mean, mean=mean)

    yield linear("embed_tokens", vocab, hidden)  # the model multiplies it by sqrt(hidden)
    yield Tensor("model.embed_tokens_per_layer.weight", (vocab, layers * ple), std=ple**-0.5)
    yield linear("per_layer_model_projection", layers * ple, hidden)
    yield norm("per_layer_projection_norm", ple)
    yield norm("norm", hidden)
    for i, layer_type in enumerate(config["layer_types"]):
        at = f"layers.{i}"
        head = config["global_head_dim" if layer_type == "full_attention" else "head_dim"]
        q_rows = config["num_attention_heads"] * head
        kv_rows = config["num_key_value_heads"] * head
        wide = config["intermediate_size"]
        if i >= owners and config["use_double_wide_mlp"]:
            wide *= 2
        yield norm(f"{at}.input_layernorm", hidden)
        yield linear(f"{at}.self_attn.q_proj", q_rows, hidden)
        yield norm(f"{at}.self_attn.q_norm", head)
        if i < owners or dead_kv:
            yield linear(f"{at}.self_attn.k_proj", kv_rows, hidden)
            yield linear(f"{at}.self_attn.v_proj", kv_rows, hidden)
            yield norm(f"{at}.self_attn.k_norm", head, mean=0.1)  # q.k is not divided by sqrt(head)
        yield linear(f"{at}.self_attn.o_proj", hidden, q_rows)
        yield norm(f"{at}.post_attention_layernorm", hidden)
        yield norm(f"{at}.pre_feedforward_layernorm", hidden)
        yield linear(f"{at}.mlp.gate_proj", wide, hidden)
        yield linear(f"{at}.mlp.up_proj", wide, hidden)
        yield linear(f"{at}.mlp.down_proj", hidden, wide)
        yield norm(f"{at}.post_feedforward_layernorm", hidden)
        yield linear(f"{at}.per_layer_input_gate", ple, hidden)
        yield linear(f"{at}.per_layer_projection", hidden, ple)
        yield norm(f"{at}.post_per_layer_input_norm", hidden)
        yield Tensor(f"model.{at}.layer_scalar", (1,), std=0.05, mean=0.85)


def mobile_config(config: dict[str, Any]) -> dict[str, Any]:
    patterns = {pattern: {"num_bits": bits} for pattern, bits in MOBILE.items()}
    quantisation = {
        "quant_method": "gemma", "num_bits": OTHERS, "quantize_embeddings": True,
        "module_quant_configs": patterns,
    }  # fmt: skip
    return config | {"tie_word_embeddings": False, "quantization_config": quantisation}


def mobile(plain: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same weights as integers with their scales, and a head beside the embedding."""
    for tensor in plain:
        if len(tensor.shape) == 1:
            yield tensor
            continue
        yield from integers(tensor)
        if tensor.name == "model.embed_tokens.weight":
            yield from integers(tensor._replace(name="lm_head.weight"))


def integers(tensor: Tensor) -> Iterator[Tensor]:
    base = tensor.name.removesuffix(".weight")
    bits = next((b for pattern, b in MOBILE.items() if re.search(pattern, base)), OTHERS)
    rows, columns = tensor.shape
    table = base.startswith("model.embed_tokens")
    values, scale = ("embedding_quantized", "embedding_scale") if table else (
        "weight", "weight_scale"
    )  # fmt: skip
    dtype = "I8" if bits == 8 else "U8"
    yield Tensor(f"{base}.{values}", (rows, columns * bits // 8), dtype=dtype, bits=bits)
    unit = tensor.std / ((((1 << bits) - 1) ** 2 - 1) / 12) ** 0.5  # by the deviation of integers
    yield Tensor(f"{base}.{scale}", (rows, 1), 0.1 * unit, unit, "F32")
    if not table:
        free = base == "lm_head"  # its highest logits are not to be cut to one value
        yield Tensor(f"{base}.input_activation_scale", (), 0.0, ACTIVATION_STEP, "F32")
        yield Tensor(
            f"{base}.output_activation_scale", (), 0.0, ACTIVATION_STEP * (not free), "F32"
        )


def symmetric_bytes(bits: int) -> np.ndarray:
    """Bytes without the lowest integer: a mean beside 0 would grow from layer to layer."""
    every = np.arange(256, dtype=np.uint8)
    if bits == 8:
        return every[every != 128]  # -128
    fields = every[:, None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8((1 << bits) - 1)
    return every[(fields != 0).all(1)]


def shards(all_tensors: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    size = 0
    for tensor in all_tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def values(tensor: Tensor, seed: int) -> Iterator[np.ndarray]:
    """The tensor's values in blocks; they depend on the seed and its name alone."""
    stream = np.random.SFC64(np.random.SeedSequence([seed, crc32(tensor.name.encode())]))
    random = np.random.Generator(stream)
    left = int(np.prod(tensor.shape))
    allowed = symmetric_bytes(tensor.bits) if tensor.bits else None
    while left:
        count = min(left, BLOCK)
        left -= count
        if allowed is not None:
            yield random.choice(allowed, count)
            continue
        block = random.standard_normal(count, dtype=np.float32)
        block *= tensor.std
        block += tensor.mean
        yield block if tensor.dtype == "F32" else block.astype(ml_dtypes.bfloat16)


def write_shard(path: Path, shard: list[Tensor], seed: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            for block in values(tensor, seed):
                file.write(block.tobytes())


def write_tokenizer(source: Path, out: Path) -> None:
    """From a directory with a tokenizer.json, or from a GGUF file of the same vocabulary."""
    if source.suffix == ".gguf":
        from transformers import AutoTokenizer  # slow to import, and only needed here

        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)
    else:
        for file in source.glob("tokenizer*"):
            shutil.copy(file, out)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_checkpoint(model: str, out: Path, seed: int, dead_kv: bool, few_bits: bool) -> None:
    config = make_config(model)
    every = tensors(config, dead_kv)
    if few_bits:
        config, every = mobile_config(config), mobile(every)
    parts = list(shards(every))
    total = sum(tensor.nbytes for shard in parts for tensor in shard)
    done = 0
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(parts, start=1):
        name = f"model-{i:05}-of-{len(parts):05}.safetensors"
        write_shard(out / name, shard, seed)
        weight_map |= {tensor.name: name for tensor in shard}
        done += sum(tensor.nbytes for tensor in shard)
        print(f"{name}: {done / 1e9:.2f} of {total / 1e9:.2f} GB", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(out / "model.safetensors.index.json", index)
    write_json(out / "config.json", config)  # last: a directory without it is unfinished


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="e2b")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="directory or GGUF to take one from")
    parser.add_argument("--dead-kv", action="store_true", help="unused k/v too, as on the hub")
    parser.add_argument("--mobile", action="store_true", help="integers of 2, 4 and 8 bits")
    args = parser.parse_args()
    if (args.out / "config.json").exists():
        sys.exit(f"{args.out} already holds a checkpoint; remove it to make another.")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tokenizer:
        write_tokenizer(args.tokenizer, args.out)
    write_checkpoint(args.model, args.out, args.seed, args.dead_kv, args.mobile)


if __name__ == "__main__":
    main()
