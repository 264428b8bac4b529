"""Quantised checkpoints are kept as they are: the same integers, the same scales, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from test_checkpoints import as_gguf, configure, rewrite
from transformers.integrations.gemma_quant import (
    QuantizedEmbedding,
    QuantizedLinear,
    replace_with_quant_layers,
)
from transformers.utils.quantization_config import GemmaQuantizationConfig

from edge_kv import models, runtime
from edge_kv.artifact import read_artifact
from edge_kv.errors import ConfigError, WeightsError
from edge_kv.export import export_model
from edge_kv.export.weight_file import StoredWeights, WeightLayout
from edge_kv.formats import FORMATS, GROUP, dequantise, find_format, unpack
from edge_kv.models.checkpoint import open_checkpoint
from edge_kv.tensors import KEPT, storage
from edge_kv.weights import gguf_blocks
from edge_kv.weights.compressed_tensors import joined_packed
from edge_kv.weights.gemma_quant import joined_integers
from edge_kv.weights.safetensors_file import open_safetensors


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def llama(tmp_path):
    """A saved Llama whose rows are whole blocks."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    root = tmp_path / "llama"
    hf.LlamaForCausalLM(config).save_pretrained(root)
    return root


def matrices(checkpoint):
    return [name for name, row in checkpoint.rows.items() if len(row.shape) > 1]


def assert_kept(checkpoint):
    """Every matrix comes in the format it claims, in any range, with the values that are read."""
    formats = checkpoint.formats()
    for name in matrices(checkpoint):
        fmt, (rows, cols) = find_format(formats[name]), checkpoint.rows[name].shape
        assert checkpoint.is_exact(name)
        packed = checkpoint.packed(name, fmt, 0, rows)
        values = dequantise(fmt, unpack(fmt, packed, rows, cols))
        same(values, checkpoint.read(name))
        part = checkpoint.packed(name, fmt, GROUP, rows - 3)
        same(dequantise(fmt, unpack(fmt, part, rows - 3 - GROUP, cols)), values[GROUP:-3])
        assert checkpoint.packed(name, FORMATS["code4-s8"], 0, rows) is None


# --- GGUF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q5_0, Kind.Q8_0, Kind.IQ4_NL])
def test_blocks_are_the_integers_of_our_formats(kind):
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = np.random.default_rng(0).integers(0, 256, (5, 3 * size), np.uint8)
    scales = np.array([0.1, -3.0, 6e-8, 0.0, 1000.0], np.float16).view(np.uint8).reshape(5, 2)
    for block in range(3):
        raw[:, block * size : block * size + 2] = np.roll(scales, block, 0)
    fmt = FORMATS[gguf_blocks.kept_as(kind.name)]
    q = gguf_blocks.integers(kind.name, raw, size)
    assert q.codes.min() >= fmt.low and q.codes.max() <= fmt.high
    same(dequantise(fmt, q), gguf.quants.dequantize(raw, kind))


@pytest.mark.parametrize(
    "kind, format", [(Kind.Q4_0, "int4-f16"), (Kind.Q5_0, "int8-f16"), (Kind.Q8_0, "int8-f16")]
)
def test_a_gguf_file_is_kept(llama, tmp_path, kind, format):
    checkpoint = open_checkpoint(as_gguf(llama, tmp_path / "x.gguf", "llama", kind))
    assert set(checkpoint.formats().values()) == {format}
    assert_kept(checkpoint)


def test_types_that_no_format_holds_take_eight_bits(llama, tmp_path):
    checkpoint = open_checkpoint(as_gguf(llama, tmp_path / "x.gguf", "llama", Kind.Q4_1))
    assert set(checkpoint.formats().values()) == {"int8-f16"}
    assert not any(map(checkpoint.is_exact, matrices(checkpoint)))
    assert checkpoint.packed("embed", FORMATS["int8-f16"], 0, 96) is None
    assert open_checkpoint(llama).formats() == {}


def test_a_scale_that_is_not_finite_is_refused(llama, tmp_path):
    path = as_gguf(llama, tmp_path / "x.gguf", "llama", Kind.Q8_0)
    data = bytearray(path.read_bytes())
    checkpoint = open_checkpoint(path)
    scale = np.ascontiguousarray(checkpoint._stored["output.weight"].integers(0, 1).block_scales)
    at = data.index(scale.tobytes()[:2] + checkpoint._stored["output.weight"].integers(0, 1)
                    .codes.tobytes()[:8])  # fmt: skip
    data[at : at + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="scale that is not finite"):
        open_checkpoint(path).packed("head", FORMATS["int8-f16"], 0, 96)


# --- compressed-tensors -------------------------------------------------------------------------


def packed_tensors(rows, cols, bits, group, scale_type=torch.bfloat16, seed=0):
    """(tensors of one matrix as compressed-tensors packs it, its values)."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (rows, cols))
    per = 32 // bits
    fields = np.zeros((rows, -(-cols // per) * per), np.uint64)
    fields[:, :cols] = codes + (1 << bits - 1)
    words = (fields.reshape(rows, -1, per) << np.arange(0, 32, bits, dtype=np.uint64)).sum(2)
    scale = torch.from_numpy(rng.uniform(0.01, 0.1, (rows, cols // group))).to(scale_type)
    tensors = {
        "weight_packed": torch.from_numpy(words.astype(np.uint32).view(np.int32)),
        "weight_scale": scale, "weight_shape": torch.tensor([rows, cols]),
    }  # fmt: skip
    values = codes.astype(np.float32) * np.repeat(scale.float().numpy(), group, 1)
    return tensors, values


def one(tmp_path, tensors, joined, *more):
    save_file({f"m.{k}": v.contiguous() for k, v in tensors.items()}, tmp_path / "one.safetensors")
    found = joined(open_safetensors(tmp_path / "one.safetensors"), *more)
    assert list(found) == ["m.weight"]
    return found["m.weight"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group, scale", [(32, "f16"), (64, "f16"), (128, "f16"), (256, "row")])
def test_packed_integers_are_kept(tmp_path, bits, group, scale):
    tensors, values = packed_tensors(20, 256, bits, group)
    stored = one(tmp_path, tensors, joined_packed)
    assert not stored.fault and stored.exact and stored.shape == (20, 256)
    assert stored.format == f"int{bits}-{scale}"
    same(stored.rows(3, 17), values[3:17])
    same(dequantise(FORMATS[stored.format], stored.integers(3, 17)), values[3:17])


def test_scales_that_are_no_halves_lose_their_last_digits(tmp_path):
    tensors, values = packed_tensors(4, 64, 4, 32, torch.float32)
    stored = one(tmp_path, tensors, joined_packed)
    assert stored.format == "int4-f16" and not stored.exact
    same(stored.rows(0, 4), values)
    kept = dequantise(FORMATS["int4-f16"], stored.integers(0, 4))
    np.testing.assert_allclose(kept, values, rtol=2**-11)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight_zero_point": torch.zeros(1, 2)}, "zero points"),
        ({"weight_g_idx": torch.zeros(64, dtype=torch.int32)}, "order of its own"),
        ({"weight_scale": torch.zeros(4, 4)}, "whole 32s"),
        ({"weight_scale": torch.zeros(3, 2)}, "whole 32s"),
        ({"weight_shape": torch.tensor([4, 60])}, "whole 32s"),
        ({"weight_shape": torch.tensor([4.0, 64.0])}, "without its scales or its shape"),
        ({"weight_packed": torch.zeros(4, 8)}, "whole 32s"),
    ],
)
def test_packing_that_cannot_be_read_is_told(tmp_path, change, message):
    tensors, _ = packed_tensors(4, 64, 4, 32)
    stored = one(tmp_path, {**tensors, **change}, joined_packed)
    assert message in stored.fault and stored.integers is None


def pack_llama(root, group=32):
    """Make the saved Llama one whose linears are packed; embedding and head stay floats."""
    tensors = load_file(root / "model.safetensors")
    for seed, name in enumerate(sorted(tensors)):
        if "layers" in name and tensors[name].ndim == 2:
            packed, _ = packed_tensors(*tensors.pop(name).shape, 4, group, seed=seed)
            base = name.removesuffix(".weight")
            tensors |= {f"{base}.{k}": v for k, v in packed.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, root / "model.safetensors")
    configure(root, quantization_config={
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
    })  # fmt: skip


def test_floats_of_a_quantised_checkpoint_take_eight_bits(llama):
    pack_llama(llama)
    checkpoint = open_checkpoint(llama)
    checkpoint.check()
    held = checkpoint.formats()
    assert set(held.values()) == {"int4-f16"} and "head" not in held
    scheme, formats = storage("auto", models.weights(checkpoint.config), held)
    assert scheme == KEPT
    assert formats == {"embed": "int8-f16", "head": "int8-f16", "linear": "int4-f16",
                       "kv": "int4-f16"}  # fmt: skip


# --- Gemma's integers ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_of_gemma_mean_what_transformers_says(tmp_path, bits):
    made = QuantizedLinear(64, 24, num_bits=bits)
    table = QuantizedEmbedding(40, 64, torch.float32, num_bits=bits)
    generator = torch.Generator().manual_seed(bits)
    for values, scale in ((made.weight, made.weight_scale),
                          (table.embedding_quantized, table.embedding_scale)):  # fmt: skip
        low, high = (-128, 128) if bits == 8 else (0, 256)
        values.data = torch.randint(low, high, values.shape, generator=generator).to(values.dtype)
        scale.data = torch.rand(scale.shape, generator=generator)
    made.input_activation_scale.data = torch.tensor(0.05)
    quantisation = {"num_bits": 8, "module_quant_configs": {"other": {"num_bits": 2},
                                                            "^m$": {"num_bits": bits}}}  # fmt: skip
    linear = one(tmp_path, made.state_dict(), joined_integers, quantisation)
    same(linear.rows(0, 24), made._dequantize_weights().detach())
    assert linear.format == f"int{bits}-row" and linear.steps == (pytest.approx(0.05), 0)
    same(dequantise(FORMATS[linear.format], linear.integers(5, 20)), linear.rows(5, 20))
    rows = one(tmp_path, table.state_dict(), joined_integers, quantisation)
    same(rows.rows(0, 40), table.weight.detach())
    same(dequantise(FORMATS[rows.format], rows.integers(0, 40)), table.weight.detach())


def test_bits_that_cannot_be_are_refused(tmp_path):
    for quantisation in ({"num_bits": 3}, {"module_quant_configs": {"(": {}}},
                         {"module_quant_configs": [1]},
                         {"module_quant_configs": {"a": {"num_bits": "4"}}}):  # fmt: skip
        with pytest.raises(ConfigError, match="quantization_config"):
            joined_integers({}, quantisation)


# --- integers that were published as floats -----------------------------------------------------


def quantise_dequantise(root, wanted=lambda name: True):
    """Put what Q4_0 makes of its matrices into a saved model, in bf16."""

    def change(tensors):
        for name, tensor in tensors.items():
            if tensor.ndim == 2 and wanted(name):
                raw = gguf.quants.quantize(tensor.numpy(), Kind.Q4_0)
                tensors[name] = torch.from_numpy(gguf.quants.dequantize(raw, Kind.Q4_0))
        return {name: tensor.bfloat16() for name, tensor in tensors.items()}

    rewrite(root, change)


def test_integers_in_bf16_are_found(llama):
    quantise_dequantise(llama)
    checkpoint = open_checkpoint(llama)
    assert set(checkpoint.formats().values()) == {"int4-f16"}
    assert_kept(checkpoint)
    kept = load_file(llama / "model.safetensors")["lm_head.weight"]
    assert torch.equal(torch.from_numpy(checkpoint.read("head")).bfloat16(), kept)


def test_floats_are_not_taken_for_integers(llama):
    quantise_dequantise(llama, lambda name: "o_proj" in name)
    assert open_checkpoint(llama).formats() == {}


# --- export -------------------------------------------------------------------------------------


def exported(weights, out, **wanted):
    return export_model(
        weights=str(weights),
        ctx=64,
        chunk=8,
        kv="f32",
        out=out,
        open_session=runtime.load,
        **wanted,
    )


def stored_values(root, config, name):
    manifest = read_artifact(root).manifest
    layout = WeightLayout(models.weights(config), manifest.quant.formats)
    t = layout.by_name[name]
    packed = StoredWeights(layout, root / "onnx" / "weights.bin").read(
        layout.region(t).name, 0, layout.region(t).shape[0]
    )
    return dequantise(t.format, unpack(t.format, packed.numpy(), *t.spec.shape))


def test_export_keeps_a_quantised_checkpoint(llama, tmp_path):
    path = as_gguf(llama, tmp_path / "x.gguf", "llama", Kind.Q4_0)
    checkpoint = open_checkpoint(path)
    root = exported(path, tmp_path / "kept")
    quant = read_artifact(root).manifest.quant
    assert quant.scheme == KEPT and set(quant.formats.values()) == {"int4-f16"}
    assert all(report.error == 0 for report in quant.tensors.values())
    for name in matrices(checkpoint):
        same(stored_values(root, checkpoint.config, name), checkpoint.read(name))
    again = exported(path, tmp_path / "rounded", quant="int4", calibration="none")
    assert read_artifact(again).manifest.quant.scheme == "int4"
    assert read_artifact(again).manifest.quant.tensors["embed"].error > 0.02


def test_export_of_packed_integers_runs(llama, tmp_path):
    pack_llama(llama)
    checkpoint = open_checkpoint(llama)
    root = exported(llama, tmp_path / "kept")
    tensors = read_artifact(root).manifest.quant.tensors
    assert all(r.error == 0 for r in tensors.values() if r.format == "int4-f16")
    assert 0 < tensors["head"].error < 0.01
    same(stored_values(root, checkpoint.config, "layers.0.attn.q"),
         checkpoint.read("layers.0.attn.q"))  # fmt: skip


def integer_llama(root, bits, seed=0):
    """Make the saved Llama one of `quant_method: gemma`, drawn anew; transformers' model of it."""
    model = hf.LlamaForCausalLM.from_pretrained(root, attn_implementation="eager").eval()
    patterns = {"lm_head": {"num_bits": 2}, "mlp": {"num_bits": bits}, "v_proj": {"num_bits": 8}}
    quantisation = GemmaQuantizationConfig(
        num_bits=4, quantize_embeddings=True, module_quant_configs=patterns
    )
    replace_with_quant_layers(model, quantisation)
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            linear = isinstance(module, QuantizedLinear)
            values = module.weight if linear else module.embedding_quantized
            low, high = (-128, 128) if module.num_bits == 8 else (0, 256)
            drawn = torch.randint(low, high, values.shape, generator=generator)
            values.data = drawn.to(values.dtype)
            scale = module.weight_scale if linear else module.embedding_scale
            unit = (1 << module.num_bits) / 3.5 * 64**0.5
            if name.endswith(("o_proj", "down_proj", "lm_head")):
                unit *= 4  # a value that rounds to the other side is to stay a small difference
            scale.data = (0.5 + torch.rand(scale.shape, generator=generator)) / unit
    ranges = {}

    def watch(module, args, out):
        ranges[module] = float(args[0].abs().max()), float(out.abs().max())

    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    hooks = [module.register_forward_hook(watch) for module in linears]
    with torch.no_grad():
        model(torch.arange(64)[None], use_cache=False)
    for hook, (module, (before, after)) in zip(hooks, ranges.items(), strict=True):
        hook.remove()
        module.input_activation_scale.data = torch.tensor(before / 127)
        module.output_activation_scale.data = torch.tensor(after / 127)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    tensors["model.layers.0.self_attn.k_cache_scale"] = torch.tensor(0.1)
    save_file(tensors, root / "model.safetensors")
    configure(root, quantization_config={
        "quant_method": "gemma", "num_bits": 4, "quantize_embeddings": True,
        "module_quant_configs": patterns,
    })  # fmt: skip
    return model


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_with_static_activations_run_as_in_transformers(llama, tmp_path, bits):
    model = integer_llama(llama, bits)
    ids = np.random.default_rng(0).integers(0, 96, 24)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    root = exported(llama, tmp_path / "kept", backends=("onnx", "executorch"))
    quant = read_artifact(root).manifest.quant
    assert quant.scheme == KEPT and not any(r.error for r in quant.tensors.values())
    assert {r.format for r in quant.tensors.values()} >= {"int2-row", f"int{bits}-row", "int8-row"}
    for engine in ("onnx", "onnx-stock", "executorch"):
        with runtime.load(root, engine) as session:
            session.prefill(ids[:8])
            for at in range(8, len(ids)):
                logits = session.decode(int(ids[at]))
                assert np.abs(logits - expected[at]).max() < 0.05 * expected.std(), (engine, at)
