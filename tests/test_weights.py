"""Checkpoint readers against the models that were saved, and every way a checkpoint can be bad."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers, trainers
from tokenizers.models import BPE
from weights_gguf import gemma3_270m, write_gguf
from weights_models import NAMES, canonical_tensors, tiny_hf

from edge_kv import models
from edge_kv.errors import ConfigError, EdgeKVError, WeightsError
from edge_kv.models.sources import open_weights
from edge_kv.weights.gguf_text import GGUFText
from edge_kv.weights.gguf_tokenizer import hf_tokenizer_json
from edge_kv.weights.source import Generation


@pytest.fixture(scope="module", params=NAMES)
def saved(request, tmp_path_factory):
    """(model, directory) of every family."""
    model = tiny_hf(request.param)
    root = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(root)
    return model, root


@pytest.fixture
def e2b(tmp_path):
    """A fresh directory to damage."""
    tiny_hf("e2b").save_pretrained(tmp_path)
    return tmp_path


def assert_same(source, model, tolerance=0.0):
    want = canonical_tensors(model)
    assert [s.name for s in models.weights(source.config)] == sorted(
        want, key=[s.name for s in models.weights(source.config)].index
    )
    source.check(values=True)
    for name, value in want.items():
        got = source.read(name)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, value.float().numpy(), atol=tolerance, rtol=0, err_msg=name)


def rewrite(root: Path, edit) -> None:
    """Load a directory's tensors, let `edit` change the dict, save."""
    tensors = load_file(root / "model.safetensors")
    edit(tensors)
    save_file(tensors, root / "model.safetensors")


def edit_config(root: Path, **changes) -> None:
    path = root / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- Hugging Face directories -------------------------------------------------------------------


def test_directory_equals_model(saved):
    model, root = saved
    assert_same(open_weights(str(root)), model)


def test_row_ranges_equal_the_full_read(saved):
    source = open_weights(str(saved[1]))
    for spec in models.weights(source.config):
        whole, n = source.read(spec.name), spec.shape[0]
        for start, stop in ((0, n), (0, 1), (n // 3, n), (n - 1, n), (n, n)):
            np.testing.assert_array_equal(source.read(spec.name, start, stop), whole[start:stop])


def test_sharded(tmp_path):
    model = tiny_hf("e4b")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(open_weights(str(tmp_path)), model)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(WeightsError, match="lacks 1 of"):
        open_weights(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_widens_exactly(tmp_path, dtype):
    model = tiny_hf("26b").to(dtype)
    model.save_pretrained(tmp_path)
    assert_same(open_weights(str(tmp_path)), model)


def test_gemma3_bf16_norms_get_their_one_in_f32(tmp_path):
    model = tiny_hf("gemma3").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    want = model.model.norm.weight.float().detach().numpy() + 1  # not bf16(w + 1)
    np.testing.assert_array_equal(open_weights(str(tmp_path)).read("norm"), want)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_multimodal_prefixes_and_towers(e2b, prefix):
    def nest(tensors):
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
        tensors["model.vision_tower.encoder.layers.0.self_attn.k_proj.weight"] = torch.ones(2)
        tensors["model.embed_audio.embedding_projection.weight"] = torch.ones(2, 2)
        tensors["lm_head.weight"] = tensors[f"{prefix}embed_tokens.weight"].clone()
        # Published checkpoints keep the dead keys and values of the sharing layers.
        for dead in ("k_proj", "v_proj", "k_norm"):
            tensors[f"{prefix}layers.5.self_attn.{dead}.weight"] = torch.ones(3)

    rewrite(e2b, nest)
    assert_same(open_weights(str(e2b)), tiny_hf("e2b"))


def test_texts_beside_the_weights(e2b):
    text = open_weights(str(e2b)).text
    assert (text.tokenizer_json(), text.chat_template(), text.stop_ids()) == (None, None, [])
    added = [{"id": 1, "content": "<eos>"}, {"id": 99, "content": "<turn|>"}]
    (e2b / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (e2b / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 50, 106]}))
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "{{ D }}"}]
    (e2b / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    source = open_weights(str(e2b))
    assert json.loads(source.text.tokenizer_json() or "")["added_tokens"] == added
    assert source.text.chat_template() == "{{ D }}"
    assert source.text.stop_ids() == [50, 99]  # 1 and 106 are the config's
    odd = [{"name": ["default"], "template": "T"}, {"name": {}}, 1, *named]
    (e2b / "tokenizer_config.json").write_text(json.dumps({"chat_template": odd}))
    entries = [{"id": 98, "content": ["<turn|>"]}, {"id": True, "content": "<turn|>"}, None]
    (e2b / "tokenizer.json").write_text(json.dumps({"added_tokens": entries}))
    text = open_weights(str(e2b)).text
    assert (text.chat_template(), text.stop_ids()) == ("{{ D }}", [50])
    (e2b / "chat_template.jinja").write_text("{{ file }}")
    assert source.text.chat_template() == "{{ file }}"


def test_the_files_that_transformers_reads_are_read(e2b):
    """model.safetensors, then the index; other files of the directory are not the model."""
    other = {k: v + 1 for k, v in load_file(e2b / "model.safetensors").items()}
    save_file(other, e2b / "model-00001-of-00001.safetensors")
    save_file(other, e2b / "consolidated.safetensors")
    save_file({"a.lora_A.weight": torch.zeros(2, 2)}, e2b / "adapter_model.safetensors")
    save_file({"state.0.exp_avg": torch.zeros(2, 2)}, e2b / "optimizer.safetensors")
    index(dict.fromkeys(other, "model-00001-of-00001.safetensors"))(e2b)
    assert_same(open_weights(str(e2b)), tiny_hf("e2b"))
    (e2b / "model.safetensors").rename(e2b / "named.safetensors")
    assert open_weights(str(e2b)).read("norm")[0] == other["model.norm.weight"][0]
    edit_config(e2b, transformers_weights="named.safetensors")
    assert_same(open_weights(str(e2b)), tiny_hf("e2b"))


def test_a_head_that_differs_from_the_token_table_is_used(e2b):
    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(e2b, add_head)
    assert_same(open_weights(str(e2b)), tiny_hf("e2b"))

    def change_one(tensors):
        tensors["lm_head.weight"][127, 63] += 1e-3

    rewrite(e2b, change_one)
    source = open_weights(str(e2b))
    source.check(values=True)
    assert not source.config.tied
    assert source.read("head", 127)[0, 63] - source.read("embed", 127)[0, 63] > 5e-4


def test_tied_weights_may_be_stored_as_the_head_alone(e2b):
    def move(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    rewrite(e2b, move)
    assert_same(open_weights(str(e2b)), tiny_hf("e2b"))


@pytest.mark.parametrize("rows", [96, 160])
def test_the_per_layer_table_may_have_other_rows_than_the_token_table(tmp_path, rows):
    model = tiny_hf("e2b", vocab_size_per_layer_input=rows)
    model.save_pretrained(tmp_path)
    source = open_weights(str(tmp_path))
    source.check()
    want = model.model.embed_tokens_per_layer.weight.detach().numpy()
    got = source.read("ple.embed")
    both = min(rows, 128)
    np.testing.assert_array_equal(got[:both], want[:both])
    np.testing.assert_array_equal(got[rows:], np.repeat(want[:1], max(0, 128 - rows), 0))
    np.testing.assert_array_equal(source.read("ple.embed", 90, 99), got[90:99])
    np.testing.assert_array_equal(source.read("ple.embed", 100, 101), got[100:101])
    edit_config(tmp_path, vocab_size_per_layer_input=64)
    with pytest.raises(WeightsError, match=r"embed_tokens_per_layer\.weight has shape"):
        open_weights(str(tmp_path)).check()


def test_recommended_sampling(e2b):
    assert open_weights(str(e2b)).text.generation() == Generation(temperature=0.0)
    path = e2b / "generation_config.json"
    stored = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "suppress_tokens": [7, 8]}
    path.write_text(json.dumps(stored | {"repetition_penalty": 1.1, "do_sample": True}))
    assert open_weights(str(e2b)).text.generation() == Generation(
        temperature=1.0, top_k=64, top_p=0.95, repetition_penalty=1.1, suppress_tokens=(7, 8)
    )
    path.write_text(json.dumps({"temperature": 1.0, "do_sample": False}))
    assert open_weights(str(e2b)).text.generation().temperature == 0
    for fault in (
        {"temperature": -1}, {"top_k": 1.5}, {"top_k": -1}, {"top_p": 1.5}, {"top_p": 0},
        {"repetition_penalty": 0}, {"suppress_tokens": [128]}, {"temperature": float("inf")},
    ):  # fmt: skip
        path.write_text(json.dumps(fault))
        with pytest.raises(ConfigError, match=next(iter(fault))):
            open_weights(str(e2b)).text.generation()
    path.write_text(json.dumps({"eos_token_id": [1, 500]}))
    with pytest.raises(ConfigError, match="token ids below 128"):
        open_weights(str(e2b)).text.stop_ids()


# --- GGUF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gguf_equals_model(name, tmp_path):
    model = tiny_hf(name)
    source = open_weights(str(write_gguf(tmp_path / "m.gguf", model)))
    assert_same(source, model)
    for spec in models.weights(source.config):
        n = spec.shape[0]
        whole = source.read(spec.name)
        np.testing.assert_array_equal(source.read(spec.name, n // 3, n), whole[n // 3 :])


def test_gguf_with_gate_and_up_experts_apart(tmp_path):
    model = tiny_hf("26b")
    source = open_weights(str(write_gguf(tmp_path / "m.gguf", model, split_experts=True)))
    assert_same(source, model)
    np.testing.assert_array_equal(
        source.read("layers.1.moe.gate_up", 2, 5), source.read("layers.1.moe.gate_up")[2:5]
    )


def test_gguf_is_known_by_its_content_whatever_its_name(tmp_path):
    model = tiny_hf("e2b")
    path = write_gguf(tmp_path / "m.gguf", model)
    for name in ("M.GGUF", "sha256-0123abcd", "folder/model.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        path = path.rename(tmp_path / name)
        assert_same(open_weights(str(path)), model)
    (path.parent / "mmproj-model.gguf").write_bytes(b"GGUF")
    (path.parent / "config.json").write_text("{}")  # of the repository it was converted from
    assert_same(open_weights(str(path.parent)), model)
    (path.parent / "model-q8.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match=r"holds 2 GGUF models \(model-q8.gguf, model.gguf\)"):
        open_weights(str(path.parent))


def in_parts(path, model, n, **metadata):
    """A GGUF file's tensors spread over n parts beside it, as gguf-split names and numbers them."""
    whole = gguf.GGUFReader(write_gguf(path, model))
    tensors = [(t.name, np.array(t.data)) for t in whole.tensors]
    names = [path.with_name(f"{path.stem}-{i + 1:05}-of-{n:05}.gguf") for i in range(n)]
    for i, name in enumerate(names):
        split = {"split.no": i, "split.count": n, "split.tensors.count": len(tensors), **metadata}
        write_gguf(name, model, metadata=split, only=dict(tensors[i::n]))
    path.unlink()
    return names


def test_gguf_in_parts(tmp_path):
    model = tiny_hf("e4b")
    parts = in_parts(tmp_path / "m.gguf", model, 3)
    source = open_weights(str(parts[0]))
    assert_same(source, model)
    assert_same(open_weights(str(tmp_path)), model)  # the directory has one model
    with pytest.raises(WeightsError, match=r"is part 2 of 3 of a model; give m-00001-of-00003"):
        open_weights(str(parts[1]))
    held = parts[2].read_bytes()
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(WeightsError, match="is not part 3 of 3"):
        open_weights(str(parts[0]))
    parts[2].unlink()
    with pytest.raises(WeightsError, match=r"m-00003-of-00003.gguf is not beside it"):
        open_weights(str(parts[0]))
    parts[2].write_bytes(held)
    with pytest.raises(WeightsError, match="names must end in -00001-of-00003"):
        open_weights(str(parts[0].rename(tmp_path / "renamed.gguf")))


def test_gguf_parts_of_different_models_are_refused(tmp_path):
    parts = in_parts(tmp_path / "m.gguf", tiny_hf("e2b"), 2, **{"split.tensors.count": 500})
    with pytest.raises(WeightsError, match="tensors, expected 500; the parts are of different"):
        open_weights(str(parts[0]))


@pytest.mark.parametrize("what", ["key", "tensor"])
def test_gguf_that_names_something_twice(what, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_hf("e2b"))
    raw = path.read_bytes()
    a, b = (b"gemma4.rope.freq_base", b"gemma4.context_length") if what == "key" else (
        b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight")  # fmt: skip
    assert len(a) == len(b)
    at = raw.index(struct.pack("<Q", len(b)) + b) + 8
    path.write_bytes(raw[:at] + a + raw[at + len(a) :])
    with pytest.raises(WeightsError, match=f"the {what} '{a.decode()}' comes twice"):
        open_weights(str(path))


def test_gguf_tensors_that_overlap_are_refused(gguf_file):
    raw = bytearray(gguf_file.read_bytes())
    at = raw.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4 + 16 + 4
    other = raw.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16 + 4
    raw[at : at + 8] = raw[other : other + 8]
    gguf_file.write_bytes(raw)
    with pytest.raises(WeightsError, match="overlap"):
        open_weights(str(gguf_file))


def test_gguf_with_an_output_head(tmp_path):
    model = tiny_hf("gemma3")
    table = model.model.embed_tokens.weight.detach().numpy()
    path = write_gguf(tmp_path / "m.gguf", model, extra={"output.weight": table})
    assert_same(open_weights(str(path)), model)
    path = write_gguf(tmp_path / "n.gguf", model, extra={"output.weight": table * 2})
    source = open_weights(str(path))
    source.check()
    np.testing.assert_array_equal(source.read("head"), 2 * source.read("embed"))


def test_gguf_with_vision_inside(tmp_path):
    vision = {"v.blk.0.attn_q.weight": np.ones((2, 2), np.float32),
              "mm.input_projection.weight": np.ones((2, 2), np.float32)}  # fmt: skip
    model = tiny_hf("gemma3")
    assert_same(open_weights(str(write_gguf(tmp_path / "m.gguf", model, extra=vision))), model)


def test_gguf_recommended_sampling(tmp_path):
    keys = {"general.sampling.temp": 0.75, "general.sampling.top_k": 64}
    path = write_gguf(tmp_path / "m.gguf", tiny_hf("gemma3"), metadata=keys)
    assert open_weights(str(path)).text.generation() == Generation(temperature=0.75, top_k=64)


@pytest.mark.parametrize(("name", "unsaid"), [("31b", 30.0), ("gemma3", 0.0)])
def test_a_softcap_that_no_file_says_is_llama_cpps(name, unsaid, tmp_path):
    arch = "gemma3" if name == "gemma3" else "gemma4"
    for said, want in ((None, unsaid), (0.0, 0.0), (12.0, 12.0)):
        metadata = {f"{arch}.final_logit_softcapping": said}
        path = write_gguf(tmp_path / f"{said}.gguf", tiny_hf(name), metadata=metadata)
        assert open_weights(str(path)).config.softcap == want
    path = write_gguf(tmp_path / "bad.gguf", tiny_hf(name), metadata={
        f"{arch}.final_logit_softcapping": -30.0})  # fmt: skip
    with pytest.raises(ConfigError, match=r"final_logit_softcapping is -30\.0, expected a number"):
        open_weights(str(path))


def test_gguf_dead_sharers_are_expected(tmp_path):
    """A converter run on a hub checkpoint keeps the sharing layers' keys and values."""
    source = open_weights(str(write_gguf(tmp_path / "m.gguf", tiny_hf("e2b"))))
    source._stored["blk.6.attn_k.weight"] = source._stored["blk.0.attn_k.weight"]
    source.check()


QUANTS = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"]


@pytest.mark.parametrize("kind", QUANTS)
def test_gguf_quant_types(kind, tmp_path):
    qtype = gguf.GGMLQuantizationType[kind]
    model = tiny_hf("26b")
    source = open_weights(str(write_gguf(tmp_path / "m.gguf", model, storage=qtype)))
    source.check(values=True)
    for name in ("layers.0.mlp.down", "layers.1.moe.gate_up", "embed"):
        value = canonical_tensors(model)[name].numpy()
        want = dequantize(quantize(value, qtype), qtype).reshape(value.shape)
        np.testing.assert_array_equal(source.read(name), want)
        np.testing.assert_array_equal(source.read(name, 1, 4), want[1:4])


@pytest.fixture(scope="module")
def gemma3():
    return open_weights(str(gemma3_270m()))


def test_real_gemma3_file(gemma3):
    preset = models.get_row("gemma3-270m").config
    assert open_weights(str(gemma3_270m()), preset).config.pattern == preset.pattern
    gemma3.check()
    assert gemma3.config.eos_ids == (1,)
    assert gemma3.text.stop_ids() == [106]
    assert gemma3.text.chat_template() is None  # this file has none
    # Q4_K, Q6_K, Q5_0 here, Q8_0 and F32 below.
    for name, rows in (("attn.out", 640), ("mlp.down", 640), ("attn.q", 1024)):
        whole = gemma3.read(f"layers.0.{name}")
        part = gemma3.read(f"layers.0.{name}", 100, 133)
        np.testing.assert_array_equal(part, whole[100:133])
        assert whole.shape[0] == rows
        assert 0.01 < whole.std() < 0.1
    rows = gemma3.read("embed", 262_140, 262_144)
    assert rows.shape == (4, 640)
    assert gemma3.read("norm").mean() > 1  # 1 + w is in the file already


@pytest.fixture(scope="module")
def tokenizer3(gemma3):
    return Tokenizer.from_str(gemma3.text.tokenizer_json())


def test_real_gemma3_tokenizer(tokenizer3):
    """Ids that transformers 5.24's own conversion and llama.cpp's llama-tokenize both give."""
    cases = json.loads((Path(__file__).parent / "weights_gemma3_ids.json").read_text())
    assert len(cases) > 50
    for text, ids in cases:
        assert tokenizer3.encode(text).ids == ids, text
        content = tokenizer3.decode(ids, skip_special_tokens=False).removeprefix("<bos>")
        if "\ufeff" not in text and "▁" not in text:  # ▁ is how the model writes a space
            assert content == text


def test_long_runs_are_cut_as_sentencepiece_cuts_them(tokenizer3):
    """User-defined pieces are taken from the left, the longest first."""
    vocab = tokenizer3.get_vocab()
    for what in (" ", "\n", "\t"):
        piece = what.replace(" ", "▁")
        longest = max(k for k in range(1, 64) if piece * k in vocab)
        assert longest == 31
        for n in (1, 2, 15, 30, 31, 32, 33, 62, 63, 64, 100, 255):
            want = [piece * longest] * (n // longest) + [piece * (n % longest)] * (n % longest > 0)
            tokens = tokenizer3.encode("é" + what * n, add_special_tokens=False).tokens
            assert tokens == ["é", *want], (what, n)


ALPHABET = "abcde  \n\té中😀▁<b>"


def sentencepiece_oracle(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE, literally: join the best-scored neighbours, leftmost first."""
    parts = list(text.replace(" ", "▁"))
    while True:
        joins = [
            (-scores[parts[i] + parts[i + 1]], i)
            for i in range(len(parts) - 1)
            if parts[i] + parts[i + 1] in scores
        ]
        if not joins:
            return parts
        _, i = min(joins)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_scores_become_the_merges_of_sentencepiece():
    rng = random.Random(3)
    pieces = list("abcd▁")
    while len(pieces) < 60:  # every piece is the union of two earlier ones
        joined = rng.choice(pieces) + rng.choice(pieces)
        if joined not in pieces and len(joined) < 7 and len(set(joined)) > 1:
            pieces.append(joined)
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = specials + pieces
    scores = [0.0] * 4 + [-float(i) for i in range(len(pieces))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [3, 3, 3, 2] + [1] * len(pieces),
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = Tokenizer.from_str(hf_tokenizer_json(metadata, "x.gguf") or "")
    by_piece = dict(zip(pieces, scores[4:], strict=True))
    for _ in range(500):
        text = "".join(rng.choice("abcd ") for _ in range(rng.randrange(1, 30)))
        assert tokenizer.encode(text).tokens == sentencepiece_oracle(text, by_piece)


@pytest.fixture(scope="module")
def bpe():
    """A small BPE with Gemma's normaliser and byte fallback, and its GGUF metadata."""
    original = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    original.normalizer = normalizers.Replace(" ", "▁")
    original.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn|>"]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials + byte_tokens)
    text = Path(__file__).read_text().replace("\n", " ")
    original.train_from_iterator([text], trainer)
    raw = json.loads(original.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] in specials]
    original = Tokenizer.from_str(json.dumps(raw))
    tokens = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in raw["model"]["merges"]],
        "tokenizer.ggml.token_type": [
            3 if t in specials else 6 if t in byte_tokens else 1 for t in tokens
        ],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "{{ bos_token }}",
    }
    return original, metadata


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60) | st.text(ALPHABET, max_size=60))
def test_gemma4_tokenizer_is_recovered(bpe, text):
    original, metadata = bpe
    ours = Tokenizer.from_str(hf_tokenizer_json(metadata, "x.gguf") or "")
    got = ours.encode(text)
    assert got.ids == [2, *original.encode(text).ids]
    assert ours.decode(got.ids) == original.decode(original.encode(text).ids)


def test_marks_are_control_tokens_whatever_their_stored_type(bpe):
    _, metadata = bpe
    marks = ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_response>", "<|think|>",
             "<start_of_turn>", "<end_of_turn>", '<|"|>']  # fmt: skip
    tokens = [*metadata["tokenizer.ggml.tokens"], *(m for m in marks if m != "<turn|>")]
    for kind in (1, 3, 4):
        stored = metadata["tokenizer.ggml.token_type"] + [kind] * (len(marks) - 1)
        stored[tokens.index("<turn|>")] = kind
        changed = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": stored}
        ours = Tokenizer.from_str(hf_tokenizer_json(metadata | changed, "x.gguf") or "")
        for mark in marks:
            encoded = ours.encode(f"a{mark}b", add_special_tokens=False)
            assert encoded.tokens == ["a", mark, "b"], (kind, mark)
            assert ours.decode(encoded.ids) == "ab"


def test_stop_ids_are_those_of_the_hub(bpe, tmp_path):
    original, metadata = bpe
    tokens = metadata["tokenizer.ggml.tokens"]
    changed = {"tokenizer.ggml.tokens": [*tokens[:-1], "<|tool_response>"],
               "tokenizer.ggml.merges": [m for m in metadata["tokenizer.ggml.merges"]
                                         if m.replace(" ", "") != tokens[-1]]}  # fmt: skip
    model = tiny_hf("31b", vocab_size=original.get_vocab_size())
    path = write_gguf(tmp_path / "m.gguf", model, metadata=metadata | changed)
    source = open_weights(str(path))
    assert (source.config.eos_ids, source.text.stop_ids()) == ((1,), [4, len(tokens) - 1])


def test_gemma4_gguf_brings_its_texts(bpe, tmp_path):
    original, metadata = bpe
    model = tiny_hf("31b", vocab_size=original.get_vocab_size())
    source = open_weights(str(write_gguf(tmp_path / "m.gguf", model, metadata=metadata)))
    source.check()
    tokenizer = Tokenizer.from_str(source.text.tokenizer_json() or "")
    assert tokenizer.get_vocab() == original.get_vocab()
    assert source.text.chat_template() == "{{ bos_token }}"
    assert source.text.stop_ids() == [4]


@pytest.mark.parametrize("tokens", [1, True, 0.5, "x", [1, 2], [[]]])
def test_stop_ids_of_a_gguf_whose_tokens_are_none(tokens):
    text = GGUFText({"tokenizer.ggml.tokens": tokens}, "x.gguf", 128, (1,))
    assert text.stop_ids() == []


# What llama.cpp makes of these, of a vocabulary without a word on spaces and special tokens.
SPACED = {
    "the and": ["<s>", "▁the", "▁and"],
    " the": ["<s>", "▁", "▁the"],
    "</s>the": ["<s>", "</s>", "▁the"],
    "é": ["<s>", "▁", "<0xC3>", "<0xA9>"],
    "": ["<s>"],
}


def test_sentencepiece_begins_with_a_space_unless_the_file_says_otherwise():
    pieces = [*"▁thedan", "th", "the", "▁the", "an", "and", "▁and"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(dict.fromkeys(tokens)),
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(set(pieces)))],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(set(pieces)))],
    }
    ours = Tokenizer.from_str(hf_tokenizer_json(metadata, "x.gguf") or "")
    for text, expected in SPACED.items():
        encoded = ours.encode(text)
        assert encoded.tokens == expected
        assert ours.decode(encoded.ids) == text.replace("</s>", "")
    plain = metadata | {"tokenizer.ggml.add_space_prefix": False}
    ours = Tokenizer.from_str(hf_tokenizer_json(plain, "x.gguf") or "")
    assert ours.encode("the and").tokens == ["<s>", "the", "▁and"]


# --- random -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_rows_do_not_depend_on_the_range(data):
    source = open_weights("random:7", models.get_row("e2b").config)
    source.check()
    name = data.draw(st.sampled_from(["ple.embed", "layers.3.mlp.up", "layers.3.scalar"]))
    rows = {row.name: row.shape[0] for row in models.weights(source.config)}[name]
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start, min(rows, start + 200)))
    cut = data.draw(st.integers(start, stop))
    whole = source.read(name, start, stop)
    parts = [source.read(name, start, cut), source.read(name, cut, stop)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_random_rows_are_the_same_in_every_process_and_differ_by_seed_and_name():
    config = models.get_row("e2b").config
    a, b = open_weights("random", config), open_weights("random:1", config)
    row = a.read("layers.0.attn.q", 5, 6)
    # Pinned: a stored artifact of random weights must be reproducible by later versions.
    np.testing.assert_allclose(row[0, :4], PINNED, rtol=1e-6)
    assert not np.array_equal(row, b.read("layers.0.attn.q", 5, 6))
    assert not np.array_equal(row, a.read("layers.1.attn.q", 5, 6))


PINNED = [-0.0095215570, 0.0107422695, -0.0007324275, 0.0317385234]


def test_random_activations_stay_sane():
    config = models.get_row("e2b").config
    source = open_weights("random", config)
    x = np.random.default_rng(0).standard_normal((64, config.hidden), np.float32)
    for name in ("attn.q", "mlp.up", "ple.gate"):
        y = x @ source.read(f"layers.4.{name}").T
        assert 0.9 < y.std() < 1.1
    for layer in (3, 4):  # head_dim 256 and 512
        q, k = (source.read(f"layers.{layer}.attn.{n}_norm") for n in "qk")
        unit = np.random.default_rng(1).standard_normal((2, 4096, len(q)), np.float32)
        scores = (unit[0] * q * unit[1] * k).sum(-1) * config.attention_scale
        assert 1.5 < scores.std() < 2.5
    scalars = [source.read(f"layers.{i}.scalar")[0] for i in range(config.layers)]
    assert 0.85 < min(scalars) < 1 < max(scalars) < 1.15


# --- bad input ----------------------------------------------------------------------------------


def test_one_error_lists_missing_surplus_shape_dtype_and_nan(e2b):
    def damage(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.extra.weight"] = torch.ones(2)
        tensors["model.norm.weight"] = torch.ones(63)
        tensors["model.layers.1.layer_scalar"] = torch.ones(1, dtype=torch.int32)
        tensors["model.layers.2.self_attn.q_proj.weight"][3, 5] = float("nan")
        tensors["model.embed_tokens_per_layer.weight"][127, 1] = float("-inf")

    rewrite(e2b, damage)
    source = open_weights(str(e2b))
    with pytest.raises(WeightsError) as error:
        source.check(values=True)
    text = str(error.value)
    assert "6 tensors are wrong" in text
    assert "model.layers.0.mlp.up_proj.weight is missing" in text
    assert "model.layers.0.mlp.extra.weight is not part of the model" in text
    assert "model.norm.weight has shape (63,), expected (64,)" in text
    assert "model.layers.1.layer_scalar is stored as I32" in text
    assert "model.layers.2.self_attn.q_proj.weight is not finite at [3, 5]" in text
    assert "model.embed_tokens_per_layer.weight is not finite at [127, 1]" in text
    with pytest.raises(WeightsError, match=r"not finite at \[3, 5\]"):
        source.read("layers.2.attn.q", 2, 4)
    source.read("layers.2.attn.q", 4, 8)
    for name, message in (
        ("layers.0.mlp.up", "up_proj.weight is missing"),
        ("norm", "has shape"),
        ("layers.1.scalar", "stored as I32"),
        ("layers.9.scalar", "not a weight of this model"),
    ):
        with pytest.raises(WeightsError, match=message):
            source.read(name)
    with pytest.raises(WeightsError, match="has rows 0 to 128, asked for 100 to 129"):
        source.read("embed", 100, 129)


def test_a_long_list_is_cut(e2b):
    edit_config(e2b, hidden_size=32)
    with pytest.raises(WeightsError) as error:
        open_weights(str(e2b)).check()
    assert str(error.value).count("expected") == 20
    assert "more." in str(error.value)


def test_padded_vocabulary_is_an_error(e2b):
    edit_config(e2b, vocab_size=120, vocab_size_per_layer_input=120)
    with pytest.raises(WeightsError, match=r"embed_tokens.weight has shape \(128, 64\), expected"):
        open_weights(str(e2b)).check()


def cut(n):
    def apply(root):
        path = root / "model.safetensors"
        path.write_bytes(path.read_bytes()[:n])

    return apply


def header(edit):
    """Rewrite the safetensors header."""

    def apply(root):
        path = root / "model.safetensors"
        raw = path.read_bytes()
        n = struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8 : 8 + n])
        edit(entries)
        text = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n :])

    return apply


def entry(**changes):
    return header(lambda entries: entries["model.norm.weight"].update(changes))


def index(weight_map):
    def apply(root):
        path = root / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))

    return apply


def duplicate(root):
    held = (root / "model.safetensors").read_bytes()
    (root / "model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        (root / name).write_bytes(held)
    index({"a": "a.safetensors", "b": "b.safetensors"})(root)


def rename(name):
    return lambda root: (root / "model.safetensors").rename(root / name)


def only(write_index):
    """An index instead of the whole file, which would go first."""

    def apply(root):
        write_index(root)
        (root / "model.safetensors").unlink()

    return apply


def explicit(name):
    return lambda root: edit_config(root, transformers_weights=name)


def doubled_key(root):
    path = root / "model.safetensors"
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    text = raw[8 : 8 + n].rstrip()
    entry = json.dumps(json.loads(text)["model.norm.weight"]).encode()
    text = text[:-1] + b', "model.norm.weight": ' + entry + b"}"
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n :])


def overlap(root):
    def edit(entries):
        start, end = entries["model.norm.weight"]["data_offsets"]
        entries["model.norm.weight"]["data_offsets"] = [start - 4, end - 4]

    header(edit)(root)


def text(name, content):
    return lambda root: (root / name).write_bytes(content)


def remove(name):
    return lambda root: (root / name).unlink()


BAD_DIRECTORY = [
    ("no config.json", remove("config.json"), "has no config.json"),
    ("no safetensors", remove("model.safetensors"), "has no .safetensors file"),
    ("config.json not JSON", text("config.json", b"{'model_type'"), "is not valid JSON"),
    ("config.json not UTF-8", text("config.json", b"\xff\xfe{}"), "cannot be read as text"),
    ("config.json a list", text("config.json", b"[]"), "is not a JSON object"),
    ("config.json nested too deep", text("config.json", b"[" * 100_000), "is not valid JSON"),
    ("empty file", cut(0), "is cut off or not a safetensors file"),
    ("cut in the header", cut(100), "is cut off or not a safetensors file"),
    ("cut in the data", cut(100_000), "is cut off: '"),
    ("not safetensors", text("model.safetensors", b"PK\x03\x04" + b"\0" * 99), "cut off or not"),
    ("header not JSON", text("model.safetensors", b"\4" + b"\0" * 7 + b"abcd"), "not JSON"),
    ("header a list", text("model.safetensors", b"\2" + b"\0" * 7 + b"[]"), "not a JSON object"),
    ("no dtype", header(lambda e: e["model.norm.weight"].pop("dtype")), "describes 'model.norm"),
    ("negative size", entry(shape=[-64]), "describes 'model.norm.weight' wrongly"),
    ("offsets reversed", entry(data_offsets=[64, 0]), "describes 'model.norm.weight' wrongly"),
    ("offsets outside", entry(data_offsets=[10**9, 10**9 + 256]), "ends at byte 1000"),
    ("wrong byte count", entry(shape=[65]), "its shape (65,) in F32 needs 260"),
    ("shard outside", only(index({"a": "../model.safetensors"})), "a path outside the directory"),
    ("shard missing", only(index({"a": "model-1.safetensors"})), "lacks 1 of 1 shards"),
    ("no weight_map", only(index(None)), "has no weight_map"),
    ("an empty weight_map", only(index({})), "has no weight_map"),
    ("same tensor twice", duplicate, "of another shard"),
    ("an adapter", text("adapter_config.json", b"{}"), "holds an adapter"),
    ("files of other names", rename("consolidated.safetensors"), "is not said; rename"),
    ("shards without an index", rename("model-00001-of-00002.safetensors"), "is not said"),
    ("a weight file outside", explicit("../model.safetensors"), "file of the directory"),
    ("a weight file of another kind", explicit("pytorch_model.bin"), "file of the directory"),
    ("a named weight file missing", explicit("other.safetensors"), "has no other.safetensors"),
    ("the same key twice", doubled_key, "describes 'model.norm.weight' twice"),
    ("tensors overlap", overlap, "overlap"),
    ("bytes of no tensor", header(lambda e: e.pop("model.norm.weight")), "are of no tensor"),
    ("a shard on two lines", only(index({"a": "x\ny"})), "names 'x\\ny', no name of a file"),
]


@pytest.mark.parametrize("what, damage, message", BAD_DIRECTORY, ids=[b[0] for b in BAD_DIRECTORY])
def test_bad_directory(e2b, what, damage, message):
    damage(e2b)
    with pytest.raises(WeightsError) as error:
        open_weights(str(e2b))
    assert message in str(error.value)
    assert str(e2b) in str(error.value)


@pytest.fixture
def gguf_file(tmp_path):
    return write_gguf(tmp_path / "m.gguf", tiny_hf("e2b"))


def test_gguf_cut_off_anywhere(gguf_file):
    raw = gguf_file.read_bytes()
    for n in (4, 8, 23, 30, 200, 1500, 5000, len(raw) // 2, len(raw) - 40_000):
        gguf_file.write_bytes(raw[:n])
        with pytest.raises(WeightsError, match="is cut off"):
            open_weights(str(gguf_file))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda raw: b"", "is cut off"),
        (lambda raw: b"GGML" + raw[4:], "is not a GGUF file"),
        (lambda raw: raw[:4] + struct.pack(">I", 3) + raw[8:], "has GGUF version 50331648"),
        (lambda raw: raw[:4] + struct.pack("<I", 1) + raw[8:], "has GGUF version 1"),
        (lambda raw: raw[:16] + struct.pack("<Q", 2**60) + raw[24:], "damaged|cut off"),
        (lambda raw: raw.replace(b"general.arch", b"general.ar\xff\xff"), "not UTF-8"),
    ],
)
def test_bad_gguf(gguf_file, edit, message):
    gguf_file.write_bytes(edit(gguf_file.read_bytes()))
    with pytest.raises(WeightsError, match=message):
        open_weights(str(gguf_file))


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_flipped_header_bytes_never_escape_as_other_errors(kind, e2b, tmp_path):
    path = e2b / "model.safetensors"
    if kind == "gguf":
        path = write_gguf(tmp_path / "m.gguf", tiny_hf("e2b"))
    whole = path.read_bytes()
    rng = random.Random(1)
    refused = 0
    for _ in range(300):
        raw = bytearray(whole)
        raw[rng.randrange(min(len(raw), 6000))] = rng.randrange(256)
        path.write_bytes(raw)
        try:
            open_weights(str(path if kind == "gguf" else e2b)).check()
        except EdgeKVError:
            refused += 1
    assert refused > 200


def test_gguf_faults_are_listed_by_their_own_names(tmp_path):
    model = tiny_hf("e2b")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[2, 3] = float("inf")
    path = write_gguf(tmp_path / "m.gguf", model)
    raw = path.read_bytes()
    assert raw.count(b"blk.1.ffn_up.weight") == 1
    path.write_bytes(raw.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(WeightsError) as error:
        open_weights(str(path)).check(values=True)
    assert "3 tensors are wrong" in str(error.value)
    assert "blk.0.ffn_up.weight is not finite at [2, 3]" in str(error.value)
    assert "blk.1.ffn_up.weight is missing" in str(error.value)
    assert "blk.1.ffn_xx.weight is not part of the model" in str(error.value)


@pytest.mark.parametrize("code, message", [(99, "GGML type 99, which is not known"),
                                           (24, "stored as I8")])  # fmt: skip
def test_gguf_storage_that_cannot_be_read(gguf_file, code, message):
    raw = gguf_file.read_bytes()
    at = raw.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    gguf_file.write_bytes(raw[:at] + struct.pack("<I", code) + raw[at + 4 :])
    with pytest.raises(WeightsError, match=message):
        open_weights(str(gguf_file)).check()


BAD_TOKENIZER = [
    ({"tokenizer.ggml.token_type": 7}, "token_type has 0 entries for"),
    ({"tokenizer.ggml.model": "rwkv"}, "'rwkv' is not supported"),
    ({"tokenizer.ggml.tokens": None}, "tokens must be a list of texts"),
    ({"tokenizer.ggml.merges": ["a"]}, "the merge 'a' does not join"),
    ({"tokenizer.ggml.merges": ["q zzz"]}, "the merge 'q zzz' does not join"),
    ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries for"),
    ({"tokenizer.ggml.tokens": ["a", "a"]}, "repeats a token"),
    ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]}, "a finite score for"),
    ({"tokenizer.ggml.unknown_token_id": 10**6}, "the unknown token 1000000"),
]


def test_scores_that_are_no_numbers_are_refused(bpe):
    kinds = [str(kind) for kind in bpe[1]["tokenizer.ggml.token_type"]]
    with pytest.raises(WeightsError, match="token_type must hold whole numbers"):
        hf_tokenizer_json(bpe[1] | {"tokenizer.ggml.token_type": kinds}, "x.gguf")
    scores = [float("nan")] * len(kinds)
    change = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}
    with pytest.raises(WeightsError, match="must hold a finite score"):
        hf_tokenizer_json(bpe[1] | change, "x.gguf")


@pytest.mark.parametrize("change, message", BAD_TOKENIZER)
def test_bad_gguf_tokenizer(bpe, change, message):
    with pytest.raises(WeightsError, match=message):
        hf_tokenizer_json(bpe[1] | change, "x.gguf")


def test_no_tokenizer_is_not_an_error(gguf_file):
    assert open_weights(str(gguf_file)).text.tokenizer_json() is None


@pytest.mark.parametrize(
    "spec, message",
    [
        ("no/such/directory/here", "does not exist; give a directory"),
        ("missing.gguf", "does not exist; give a directory"),
        ("", "does not exist; give a directory|has no config.json"),
        ("random", "name a model"),
    ],
)
def test_bad_spec(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=message):
        open_weights(spec)


@pytest.mark.parametrize("seed", ["x", "-1", "1.5"])
def test_bad_seed(seed):
    with pytest.raises(WeightsError, match="expected a whole number"):
        open_weights(f"random:{seed}", models.get_row("e2b").config)


def test_a_file_that_is_not_gguf(e2b):
    with pytest.raises(WeightsError, match="is a file but not a"):
        open_weights(str(e2b / "model.safetensors"))


def test_another_model_than_the_one_named(e2b):
    with pytest.raises(ConfigError) as error:
        open_weights(str(e2b), models.get_row("e2b").config)
    assert "vocab is 128, expected 262144" in str(error.value)
    with pytest.raises(ConfigError, match="is not the model that was named"):
        open_weights(str(e2b), models.get_row("qwen3-0.6b").config)


def test_opening_weights_imports_no_torch(e2b):
    import subprocess
    import sys

    code = (
        "import sys; from edge_kv.models.sources import open_weights; "
        "s = open_weights(sys.argv[1]); s.read('embed'); s.check(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(e2b)], check=True)
