"""Checkpoints of every family as they are published: names, storages, formats, and what is refused.

`test_models` reads what transformers saves today; here are the other layouts of the same tensors.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import DENSE, ROWS, SPARSE, tiny
from transformers import AutoModelForCausalLM
from weights_gguf import write_gguf
from weights_models import tiny_hf

from edge_kv import models
from edge_kv.errors import ConfigError, ExportError, WeightsError
from edge_kv.models.checkpoint import config_from_hf, open_checkpoint, open_described
from edge_kv.nets.oracle import oracle, table_values
from edge_kv.nets.weights import Weights
from edge_kv.request import check_new


@pytest.fixture
def saved(tmp_path):
    """Save the tiny model `name`: its directory."""

    def save(name):
        root = tmp_path / name
        tiny(name).save_pretrained(root)
        return root

    return save


def rewrite(root, change):
    """Apply `change` to the directory's tensors, in place."""
    tensors = load_file(root / "model.safetensors")
    changed = change(tensors) or tensors
    save_file({k: v.contiguous() for k, v in changed.items()}, root / "model.safetensors")


def configure(root, **fields):
    raw = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**raw, **fields}))


def assert_same(one, other, rtol=0.0):
    """Two checkpoints hold the same model, row ranges included."""
    assert one.config == other.config
    one.check()
    other.check()
    for name, row in one.rows.items():
        whole = one.read(name)
        np.testing.assert_allclose(whole, other.read(name), rtol=rtol, err_msg=name)
        middle = row.shape[0] // 2
        np.testing.assert_array_equal(other.read(name, middle), other.read(name)[middle:])


# --- layouts ------------------------------------------------------------------------------------


def halves(tensors, layers, experts):
    """ZAYA1's tensors as its first release names them: attention and experts are layers apart."""
    qkv, old = "self_attn.qkv_proj.", "self_attn.qkv."
    attn = {
        "input_layernorm.weight": "input_norm.weight",
        "self_attn.o_proj.weight": "self_attn.o_proj.weight",
        "self_attn.qk_norm.temp": f"{old}temp",
        f"{qkv}q_proj.weight": f"{old}linear_q.weight",
        f"{qkv}k_proj.weight": f"{old}linear_k.weight",
        f"{qkv}v_proj_current.weight": f"{old}val_proj1.weight",
        f"{qkv}v_proj_delayed.weight": f"{old}val_proj2.weight",
        f"{qkv}conv_qk_depthwise.weight": f"{old}conv_qk.0.weight",
        f"{qkv}conv_qk_depthwise.bias": f"{old}conv_qk.0.bias",
        f"{qkv}conv_qk_grouped.weight": f"{old}conv_qk.1.weight",
        f"{qkv}conv_qk_grouped.bias": f"{old}conv_qk.1.bias",
    }
    router = {"router_mlp.norm": "rmsnorm_eda", "router_mlp.fc1": "router_mlp.0",
              "router_mlp.fc2": "router_mlp.2", "router_mlp.out_proj": "router_mlp.4"}  # fmt: skip
    out = {}
    for name, value in tensors.items():
        name = name.removeprefix("model.")
        parts = name.split(".")
        if parts[0] != "layers":
            new = {"norm.weight": "final_norm.weight"}.get(name, name)
            if name.startswith("input_hidden_states_"):
                new = f"layers.0.res_scale.{name.removeprefix('input_')}"
            out[f"model.{new}"] = value
            continue
        i, rest = int(parts[1]), ".".join(parts[2:])
        first, second = f"model.layers.{2 * i}.", f"model.layers.{2 * i + 1}."
        if rest in attn:
            out[first + attn[rest]] = value
        elif rest == "post_attention_layernorm.weight":
            out[f"{second}input_norm.weight"] = value
        elif rest.startswith("post_attention_residual_scale."):
            out[f"{second}res_scale.{parts[-1]}"] = value
        elif rest.startswith("post_mlp_residual_scale."):
            after = f"layers.{2 * i + 2}." if i + 1 < layers else ""
            out[f"model.{after}res_scale.{parts[-1]}"] = value
        elif rest.startswith("mlp.gate."):
            own = rest.removeprefix("mlp.gate.")
            for now, before in router.items():
                own = own.replace(now, before)
            out[f"{second}zaya_block.router.{own}"] = value
        else:
            matrix = {"gate_up_proj": "linear_fc1", "down_proj": "linear_fc2"}[parts[-1]]
            for e in range(experts):
                own = f"{second}zaya_block.experts.local_experts.{e}.{matrix}.weight"
                out[own] = value[e].clone()
    return out


def test_zaya_of_the_first_release(saved, tmp_path):
    now = saved("zaya")
    fields = ROWS["zaya"][2]
    layers, experts = fields["num_hidden_layers"], fields["num_experts"]
    old = tmp_path / "old"
    old.mkdir()
    raw = {
        "model_type": "zaya", "cca": True, "vocab_size": 96, "hidden_size": 64,
        "num_hidden_layers": 2 * layers, "zaya_layers": ["a", experts] * layers,
        "num_attention_heads": 16, "cca_num_q_heads": [8, 0] * layers,
        "num_query_groups_list": [2, 0] * layers, "kv_channels": 8,
        "ffn_hidden_size_list": [0, 64] * layers, "zaya_mlp_expansion": [0, 16] * layers,
        "norm_epsilon": 1e-5, "rope_theta": 5e6, "partial_rotary_factor": 0.5,
        "max_position_embeddings": 256, "rope_scaling": False, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (old / "config.json").write_text(json.dumps(raw))
    tensors = halves(load_file(now / "model.safetensors"), layers, experts)
    save_file(tensors, old / "model.safetensors")
    assert_same(open_checkpoint(now), open_checkpoint(old))


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def scaled(tensors):
    """DeepSeek's storages: experts in E2M1 pairs, matrices in E4M3, scales in powers of two.

    Returns the tensors as stored, and by name what they stand for.
    """
    generator = torch.Generator().manual_seed(0)
    stored, meant = {}, {}
    for name, value in tensors.items():
        expert = ".experts." in name
        wide = any(f".{n}.weight" in name for n in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"))
        if not (expert or (wide and "compressor" not in name and "indexer" not in name)):
            stored[name], meant[name] = value, value
            continue
        n_out, n_in = value.shape
        block = (1, 32) if expert else (128, 128)
        grid = (-(-n_out // block[0]), -(-n_in // block[1]))
        power = torch.randint(120, 130, grid, generator=generator, dtype=torch.uint8)
        factor = torch.exp2(power.float() - 127)
        factor = factor.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        factor = factor[:n_out, :n_in]
        if expert:
            codes = torch.randint(0, 16, (n_out, n_in), generator=generator)
            bytes_ = codes[:, 0::2] | codes[:, 1::2] << 4
            stored[name] = bytes_.to(torch.uint8).view(torch.int8)
            meant[name] = E2M1[codes] * factor
        else:
            stored[name] = value.to(torch.float8_e4m3fn)
            meant[name] = stored[name].float() * factor
        stored[name.replace(".weight", ".scale")] = power.view(torch.float8_e8m0fnu)
    return stored, meant


def test_deepseek_in_scaled_floats(saved, tmp_path):
    """Hub names without a prefix, `compress_ratios`, MXFP4 experts, FP8 matrices, an MTP block."""
    root = saved("deepseek_v4")
    tensors = {
        n.removeprefix("model."): t for n, t in load_file(root / "model.safetensors").items()
    }
    stored, meant = scaled(tensors)
    assert sum(".scale" in name for name in stored) > 50
    stored["mtp.0.norm.weight"] = torch.ones(4)
    save_file(stored, root / "model.safetensors")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text((root / "config.json").read_text())
    save_file(meant, plain / "model.safetensors")
    configure(root, quantization_config={"quant_method": "fp8"}, expert_dtype="fp4")
    assert_same(open_checkpoint(plain), open_checkpoint(root))
    config = open_checkpoint(root).config
    raw = json.loads((root / "config.json").read_text())
    for key in ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters",
                "partial_rotary_factor"):  # fmt: skip
        del raw[key]
    older = {
        "compress_ratios": [0, 0, 4, 128, 4, 128, 0], "compress_rate_hca": 16,
        "num_hash_layers": 3, "qk_rope_head_dim": 8, "compress_rope_theta": 1.6e5,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1,
                         "original_max_position_embeddings": 64},
    }  # fmt: skip
    assert config_from_hf({**raw, **older}) == config


def test_laguna_with_experts_stacked_or_apart(saved, tmp_path):
    root = saved("laguna")
    names = set(load_file(root / "model.safetensors"))
    assert any(".experts.7.gate_proj.weight" in n for n in names)
    apart = open_checkpoint(root)

    def stack(tensors):
        out = {}
        for name, value in tensors.items():
            at, _, rest = name.partition(".experts.")
            if not rest[:1].isdigit():
                out[name] = value
            elif rest.startswith("0.gate"):
                each = [[tensors[f"{at}.experts.{e}.{n}_proj.weight"] for n in ("gate", "up")]
                        for e in range(8)]  # fmt: skip
                out[f"{at}.experts.gate_up_proj"] = torch.stack([torch.cat(x) for x in each])
                down = [tensors[f"{at}.experts.{e}.down_proj.weight"] for e in range(8)]
                out[f"{at}.experts.down_proj"] = torch.stack(down)
        return out

    other = tmp_path / "stacked"
    other.mkdir()
    (other / "config.json").write_text((root / "config.json").read_text())
    save_file(stack(load_file(root / "model.safetensors")), other / "model.safetensors")
    assert_same(apart, open_checkpoint(other))


# --- GGUF ---------------------------------------------------------------------------------------


def as_gguf(root, path, arch, storage=None, turned=None, **keys):
    """A saved Llama or Qwen as llama.cpp's converter writes it; `storage` quantises matrices,
    `turned` dims of a head turn instead of all, and `keys` are further metadata of the model."""
    config = json.loads((root / "config.json").read_text())
    rope = config["rope_parameters"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(turned or config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for name, i in (("bos", 1), ("eos", 2), ("padding", 0)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
    for key, value in keys.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{arch}.{key.replace('__', '.')}", value)
    kind = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2,
            "qwen3": gguf.MODEL_ARCH.QWEN3}[arch]  # fmt: skip
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(root / "model.safetensors").items():
        module, ending = name.rsplit(".", 1)
        value = tensor.float().numpy()
        n = heads.get(module.rsplit(".", 1)[-1])
        if n and arch == "llama":
            split = value.reshape(n, 2, value.shape[0] // n // 2, *value.shape[1:])
            value = np.ascontiguousarray(split.swapaxes(1, 2).reshape(value.shape))
        own = f"{names.get_name(module)}.{ending}"
        if storage is not None and value.ndim == 2:
            writer.add_tensor(own, gguf.quants.quantize(value, storage), raw_dtype=storage)
        else:
            writer.add_tensor(own, value)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", divisors(rope, config["head_dim"]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def divisors(rope, dim):
    """What llama.cpp divides the angles of Llama 3 by."""
    base = 1.0 / rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    out = []
    for length in 2 * np.pi / base:
        smooth = (low / length - 1) / (low / high - 1)
        blended = 1 / ((1 - smooth) / rope["factor"] + smooth)
        out.append(1.0 if length < high else rope["factor"] if length > low else blended)
    return np.array(out, np.float32)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_gguf_of_plain_decoders(saved, tmp_path, name):
    root = saved(name)
    one, other = open_checkpoint(root), open_checkpoint(as_gguf(root, tmp_path / "x.gguf", name))
    assert_same(one, other)
    if name == "llama":  # a range that begins and ends inside a head
        np.testing.assert_array_equal(
            other.read("layers.1.attn.q", 3, 21), one.read("layers.1.attn.q")[3:21]
        )


def test_gguf_of_llama3_turns_as_it_does(saved, tmp_path):
    from edge_kv.nets.parts import frequencies

    root = saved("llama-bias")
    one = open_checkpoint(root)
    other = open_checkpoint(as_gguf(root, tmp_path / "x.gguf", "llama"))
    a, b = (frequencies(c.config.rope) for c in (one, other))
    assert float((a / b - 1).abs().max()) < 1e-6 and float((a[0] / a[1]).abs()) > 1
    for name in one.rows:
        np.testing.assert_array_equal(one.read(name), other.read(name), err_msg=name)


@pytest.mark.parametrize(
    "keys, factor",
    [
        ({"type": "none", "factor": 4.0}, 1.0),  # as in llama.cpp, which scales nothing then
        ({"type": "linear", "factor": 4.0}, 4.0),
        ({"factor": 4.0}, 4.0),
        ({"factor": 0.0}, 1.0),
    ],
)
def test_scaled_ropes_of_gguf(saved, tmp_path, keys, factor):
    scaling = {f"rope__scaling__{key}": value for key, value in keys.items()}
    path = as_gguf(saved("llama"), tmp_path / "x.gguf", "llama", **scaling)
    assert open_checkpoint(path).config.rope.factor == factor


@pytest.mark.parametrize("key, value", [("rope__scaling__attn_factor", 2.0),
                                        ("attention__causal", 0.0)])  # fmt: skip
def test_gguf_that_llama_cpp_computes_otherwise(saved, tmp_path, key, value):
    path = as_gguf(saved("llama"), tmp_path / "x.gguf", "llama", **{key: value})
    with pytest.raises(ConfigError, match=f"{key.replace('__', '.')} = .* is not supported"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_gguf_of_heads_that_turn_in_part(saved, tmp_path, name):
    path = as_gguf(saved(name), tmp_path / "x.gguf", name, turned=4)
    with pytest.raises(ConfigError, match=r"rope.dimension_count = 4 is not supported"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["e2b", "26b", "gemma3"])
@pytest.mark.parametrize("split", [False, True])
def test_gguf_of_gemma(tmp_path, name, split):
    if split and name != "26b":
        return
    model = tiny_hf(name, eos_token_id=[1])
    model.save_pretrained(tmp_path / "hf")
    path = write_gguf(tmp_path / "x.gguf", model, split_experts=split)
    one, other = open_checkpoint(tmp_path / "hf"), open_checkpoint(path)
    for key in one.rows:
        np.testing.assert_allclose(one.read(key), other.read(key), rtol=1e-6, err_msg=key)
    assert [r.name for r in one.rows.values()] == [r.name for r in other.rows.values()]


# --- faults -------------------------------------------------------------------------------------


def test_tied_heads(saved, tmp_path):
    root = saved("llama")
    before = open_checkpoint(root).read("embed")

    def renamed(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    rewrite(root, renamed)
    np.testing.assert_array_equal(open_checkpoint(root).read("embed"), before)

    def other(tensors):
        tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] + 1

    rewrite(root, other)
    np.testing.assert_array_equal(open_checkpoint(root).read("head"), before)
    root = saved("zaya")
    rewrite(root, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    with pytest.raises(WeightsError, match=r"lm_head.weight is an LM head of its own"):
        open_checkpoint(root).check()


@pytest.mark.parametrize("name", ["llama", "e2b", "gemma3"])
def test_a_head_of_its_own_under_a_tied_config_is_used_as_transformers_does(saved, name):
    root = saved(name)

    def add(tensors):
        table = tensors["model.embed_tokens.weight"]
        drawn = torch.randn(table.shape, generator=torch.Generator().manual_seed(1)) / 8
        return tensors | {"lm_head.weight": drawn}

    rewrite(root, add)
    assert difference(root) < 2e-4


def difference(root):
    """The largest difference of the logits of the saved model in `root` from transformers'."""
    ids = torch.arange(3, 43)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
        expected = loaded.eval()(ids[None]).logits[0]
    checkpoint = open_checkpoint(root)
    checkpoint.check()
    got = oracle(
        checkpoint.config,
        Weights(models.weights(checkpoint.config)),
        lambda row, a, b: torch.from_numpy(checkpoint.read(row, a, b)),
        ids,
        token_values=table_values(checkpoint.config, checkpoint.read),
    ).logits()
    return float((got - expected).abs().max())


FULL, SLIDING = "full_attention", "sliding_attention"
PLAIN = {"rope_type": "default", "rope_theta": 77.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "name, fields",
    [
        # Added by hand beside the rope_parameters that transformers saved, as model cards advise.
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("qwen3", {"rope_scaling": YARN}),
        ("llama-bias", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 77}),
        ("llama-bias", {"rope_scaling": {"type": "default"}}),
        ("llama-bias", {"original_max_position_embeddings": 64}),
        ("qwen3", {"rope_parameters": {"type": "linear", **YARN}}),
        ("laguna", {"rope_parameters": {FULL: PLAIN, SLIDING: PLAIN}}),
        ("laguna", {"rope_parameters": {FULL: {**PLAIN, **YARN}, SLIDING: PLAIN}}),
        ("deepseek_v4", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("deepseek_v4", {"rope_scaling": {**YARN, "attention_factor": 0.7, "rope_theta": 9}}),
        ("deepseek_v4", {"compress_rates": {SPARSE: 2, DENSE: 8}, "compress_rate_csa": 4,
                         "compress_rate_hca": 16}),
        ("deepseek_v4", {"partial_rotary_factor": None, "rope_parameters": YARN}),
        ("deepseek_v4", {"rope_parameters": {"main": YARN, "compress": {"rope_theta": 50}}}),
        ("zaya-sliding", {"rope_parameters": {"hybrid": PLAIN, "hybrid_sliding": PLAIN}}),
        ("gemma3", {"rope_scaling": {"type": "default"}}),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("gemma3", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}),
    ],
)  # fmt: skip
def test_fields_that_are_said_twice_count_as_in_transformers(saved, name, fields):
    root = saved(name)
    configure(root, **fields)
    assert difference(root) < 2e-4


def test_one_error_lists_every_fault(saved):
    root = saved("laguna")

    def damage(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"]
        del tensors["model.layers.3.mlp.experts.5.up_proj.weight"]
        tensors["model.layers.2.mlp.extra.weight"] = torch.ones(2)
        tensors["model.norm.weight"] = torch.ones(47)
        tensors["model.layers.1.self_attn.k_scale"] = torch.ones(1)  # published, of no use

    rewrite(root, damage)
    with pytest.raises(WeightsError) as error:
        open_checkpoint(root).check()
    text = str(error.value)
    assert "4 tensors are wrong" in text
    assert "model.layers.0.mlp.up_proj.weight is missing" in text
    assert "model.layers.3.mlp.experts.5.up_proj.weight is missing" in text
    assert "model.norm.weight has shape (47,), expected (48,)" in text
    assert "model.layers.2.mlp.extra.weight is not part of the model" in text
    with pytest.raises(WeightsError, match="has shape"):
        open_checkpoint(root).read("norm")


def test_what_is_planned_is_what_the_tensors_are(saved, tmp_path):
    root = saved("llama")
    config, checkpoint = open_described(root)
    assert checkpoint and checkpoint.config == config
    configure(root, intermediate_size=72)
    for path in (root, as_gguf(root, tmp_path / "x.gguf", "llama")):
        with pytest.raises(WeightsError, match=r"has shape \(64, 48\), expected \(72, 48\)"):
            open_described(path)
    (root / "model.safetensors").unlink()  # a download that is not over
    assert open_described(root) == (replace(config, mlp_width=72), None)


def test_names_that_are_no_text(saved, tmp_path):
    """The manifest holds the names of the source and of the artifact."""
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    saved("llama").rename(odd)
    assert open_checkpoint(odd).label == r"directory caf\udce9"
    with pytest.raises(ExportError, match=r"caf\\udce9 is no UTF-8 text; choose another"):
        check_new(odd)


REFUSED = [
    ("llama", {"model_type": "lama"}, "model_type 'lama' is not supported. Did you mean 'llama'?"),
    ("llama", {"model_type": None}, "model_type None is not supported"),
    ("llama", {"rms_norm_eps": 0}, "norm_eps 0 must be positive"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a finite number"),
    ("llama", {"num_attention_heads": 0}, "q_heads 0 must be a positive multiple of kv_heads 2"),
    ("llama", {"num_key_value_heads": 4}, "q_heads 6 must be a positive multiple of kv_heads 4"),
    ("llama", {"head_dim": 0}, "head_dim 0 must be positive"),
    ("llama", {"head_dim": 7}, "Rotary embedding|rope"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number from 1"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    ("llama", {"eos_token_id": 96}, "eos_ids[0] 96 is not a token id"),
    ("llama", {"bos_token_id": -1}, "bos_id -1 is not a token id"),
    ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}},
        "factor is 0, expected a positive number",
    ),
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
    ("qwen3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ("llama", {"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1, expected a positive"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "original_max_position_embeddings is absent",
    ),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window = true is not supported"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types = 'sliding_attention'"),
    ("laguna", {"num_experts_per_tok": 9}, "top_k 9 must be at most the number of experts 8"),
    ("laguna", {"gating": "sometimes"}, "gating = 'sometimes' is not supported"),
    ("laguna", {"moe_apply_router_weight_on_input": True}, "moe_apply_router_weight_on_input"),
    ("laguna", {"moe_router_use_sigmoid": False}, "moe_router_use_sigmoid = false"),
    ("laguna", {"rope_parameters": {"full_attention": {}}}, "rope_theta is absent"),
    ("laguna", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling = {"),
    ("zaya", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling = {"),
    (
        "deepseek_v4",
        {"rope_parameters": {"main": {}, "compress": {**YARN, "rope_theta": 1}}},
        "YaRN needs a rope theta above 1, and it is 1",
    ),
    ("llama", {"is_causal": False}, "is_causal = false is not supported"),
    ("laguna", {"per_layer_config": {"1": {"skip": ["mlp"]}}}, "per_layer_config = {"),
    ("laguna", {"num_attention_heads_per_layer": [6]}, "num_attention_heads_per_layer"),
    ("laguna", {"sliding_window": 0}, "window 0 must be positive"),
    ("laguna", {"num_experts": 0}, "experts 0 must be positive"),
    ("zaya", {"cca_time0": 4}, "cca_time0 = 4 is not supported"),
    ("zaya", {"num_experts_per_tok": 2}, "num_experts_per_tok = 2 is not supported"),
    ("zaya", {"num_key_value_heads": 1}, "kv_heads 1 must be even"),
    ("zaya", {"layer_types": ["mamba"] * 4}, "layer_types = 'mamba' is not supported"),
    ("deepseek_v4", {"engram_layers": [1]}, "engram_layers = [1] is not supported"),
    ("deepseek_v4", {"model_type": "deepseek_v4_1"}, "model_type 'deepseek_v4_1' is not supported"),
    ("deepseek_v4", {"num_experts_per_tok": 9}, "top_k 9 must be at most the number of experts"),
    ("deepseek_v4", {"scoring_func": "relu"}, "scoring_func = 'relu' is not supported"),
    ("deepseek_v4", {"norm_topk_prob": False}, "norm_topk_prob = false is not supported"),
    ("deepseek_v4", {"layer_types": None}, "compress_ratios is absent, expected a list of 6"),
    ("deepseek_v4", {"num_key_value_heads": 2}, "num_key_value_heads = 2 is not supported"),
    ("deepseek_v4", {"hc_mult": 0}, "streams 0 must be positive"),
    ("deepseek_v4", {"hc_eps": -1.0}, "stream_eps -1 must be positive"),
]


@pytest.fixture(scope="module")
def raws(tmp_path_factory):
    """config.json of tiny models, by name."""
    out = {}
    for name in {row[0] for row in REFUSED}:
        config, _, fields = ROWS[name]
        config(**fields).save_pretrained(tmp_path_factory.mktemp(name))
        root = tmp_path_factory.getbasetemp() / f"{name}0"
        out[name] = json.loads((root / "config.json").read_text())
    return out


@pytest.mark.parametrize(
    "name, change, message",
    REFUSED,
    ids=[f"{n}-{'-'.join(c)}-{i}" for i, (n, c, _) in enumerate(REFUSED)],
)
def test_what_no_net_computes_is_refused_by_name(raws, name, change, message):
    config_from_hf(raws[name])
    with pytest.raises(ConfigError) as error:
        config_from_hf({**raws[name], **change}, "c.json")
    assert any(part in str(error.value) for part in message.split("|"))
    assert "c.json" in str(error.value)


def test_gguf_of_an_unknown_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"general.architecture 'mamba' is not supported"):
        open_checkpoint(tmp_path / "x.gguf")


def test_plans_beyond_a_model_are_refused():
    from edge_kv.errors import PlanError

    config = models.get_row("smollm2-135m").config
    with pytest.raises(PlanError, match="ctx 8193 is outside 1 … 8192"):
        models.plan(config, ctx=8193)
    with pytest.raises(PlanError, match="chunk 0"):
        models.plan(config, ctx=64, chunk=0)
