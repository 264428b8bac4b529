"""Tokenizers are tried before an export, and hold no token that the model has no row for."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from edge_kv.errors import ConfigError, WeightsError
from edge_kv.runtime.template import Template
from edge_kv.runtime.text import Tokenizer as RuntimeTokenizer
from edge_kv.weights.gguf_text import GGUFText
from edge_kv.weights.gguf_tokenizer import hf_tokenizer_json
from edge_kv.weights.hf_text import HFText
from edge_kv.weights.tokenizer import opened, text_end, text_start, usable_tokenizer

VOCAB = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "abab": 4}


def tokenizer(**changes: object) -> str:
    model = {"type": "BPE", "unk_token": "<unk>", "vocab": VOCAB, "fuse_unk": True,
             "merges": [["a", "b"], ["ab", "ab"]]}  # fmt: skip
    added = [{"id": 0, "content": "<unk>", "special": True, "normalized": False,
              "single_word": False, "lstrip": False, "rstrip": False}]  # fmt: skip
    return json.dumps(
        {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
         "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
         "model": model} | changes
    )  # fmt: skip


def with_image(n: int) -> str:
    raw = json.loads(tokenizer())
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": n, "content": "<image>"})
    return json.dumps(raw)


def test_a_tokenizer_that_fits_stays_as_it_is():
    assert usable_tokenizer(tokenizer(), 5, "x") == tokenizer()
    assert usable_tokenizer(with_image(5), 6, "x") == with_image(5)


def test_added_tokens_beyond_the_rows_are_taken_out():
    fitted = Tokenizer.from_str(usable_tokenizer(with_image(5), 5, "x"))
    assert fitted.encode("ab<image>").ids == [3, 0, 1, 0]  # the letters of the mark
    assert max(fitted.get_vocab().values()) == 4


def test_lengths_of_a_training_neither_cut_nor_fill_a_text(tmp_path):
    trained = Tokenizer.from_str(tokenizer())
    trained.enable_truncation(2)
    trained.enable_padding(length=9, pad_id=0, pad_token="<unk>")
    assert len(trained.encode("ab a b a b").ids) == 9
    path = tmp_path / "tokenizer.json"
    trained.save(str(path))
    for text in ("ab a b a b", "a"):
        whole = Tokenizer.from_str(tokenizer()).encode(text).ids
        used = usable_tokenizer(path.read_text(), 5, "x")
        assert Tokenizer.from_str(used).encode(text).ids == whole
        assert RuntimeTokenizer(path, bos_id=None).encode(text) == whole


def test_merges_that_are_left_out_at_random_are_not():
    raw = json.loads(tokenizer())
    raw["model"]["dropout"] = 0.5
    fitted = Tokenizer.from_str(usable_tokenizer(json.dumps(raw), 5, "x"))
    assert all(fitted.encode("abab").ids == [4] for _ in range(40))


def test_pieces_beyond_the_rows_are_another_models():
    with pytest.raises(WeightsError, match=r"knows more tokens than the model has rows \(4\)"):
        usable_tokenizer(tokenizer(), 4, "x")
    raw = json.loads(with_image(5))  # Gemma 3's is a piece as well as an added token
    raw["model"]["vocab"] = {**VOCAB, "<image>": 5}
    assert Tokenizer.from_str(usable_tokenizer(json.dumps(raw), 5, "x")).get_vocab_size() == 5


@pytest.mark.parametrize(
    "content",
    [
        "", "{}", "[]", "null", "[" * 100_000, tokenizer(model={}), tokenizer(model=None),
        tokenizer(added_tokens=[{"id": 1}]), tokenizer(normalizer={"type": "Nothing"}),
        tokenizer(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
        tokenizer(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
                                 "invert": False}),
    ],
)  # fmt: skip
def test_what_is_no_tokenizer_is_refused(content):
    with pytest.raises(WeightsError, match=r"The tokenizer\.json of x is not a tokenizer"):
        usable_tokenizer(content, 5, "x")


def test_a_tokenizer_of_which_nothing_would_be_left_is_refused():
    with pytest.raises(WeightsError, match=r"is not a tokenizer|knows more tokens"):
        usable_tokenizer(tokenizer(), 0, "x")


def post_processor(*ids: int) -> dict:
    """What puts tokens before a text: bos and, where two are given, eos behind it."""
    names = {i: t for t, i in VOCAB.items()}
    parts = [
        {"SpecialToken": {"id": names[ids[0]], "type_id": 0}} if ids else None,
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": names[ids[1]], "type_id": 0}} if len(ids) > 1 else None,
    ]
    tokens = {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in ids}
    return {"type": "TemplateProcessing", "single": [p for p in parts if p],
            "pair": [], "special_tokens": tokens}  # fmt: skip


@pytest.mark.parametrize("ends", [(), (1,), (1, 2)])
@pytest.mark.parametrize(
    "beside",
    [
        {}, {"bos_token": None}, {"bos_token": "a"}, {"bos_token": "b"},
        {"add_bos_token": True, "bos_token": "a"}, {"add_bos_token": False, "bos_token": "a"},
        {"bos_token": {"content": "ab", "__type": "AddedToken"}},
    ],
)  # fmt: skip
def test_a_text_begins_as_transformers_begins_it(tmp_path, ends, beside):
    """The start token of a model's config (Qwen has one) is no sign that texts begin with it."""
    (tmp_path / "tokenizer.json").write_text(tokenizer(post_processor=post_processor(*ends)))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **beside})
    )
    made = AutoTokenizer.from_pretrained(tmp_path)
    ids, bare = made("abab").input_ids, made("abab", add_special_tokens=False).input_ids
    expected = ids[0] if ids[: len(bare)] != bare else None

    text = HFText(tmp_path, 5, ())
    asked = opened(text.tokenizer_json(), "x"), text.named("bos_token"), 3, 5, "x"
    if expected is not None and made.bos_token_id not in (None, expected):
        with pytest.raises(WeightsError, match=r"begins a text with \['a'\], expected"):
            text_start(*asked)
        return
    bos, added = text_start(*asked)
    assert (bos if added else None) == expected
    if made.bos_token is not None:
        assert bos == made.bos_token_id


def test_the_end_token_of_templates_is_the_tokenizers(tmp_path):
    """Llama 3's config lists three, and the tokenizer names the last of them."""
    (tmp_path / "tokenizer.json").write_text(tokenizer())
    for named, ids in (("b", [2]), ({"content": "ab", "__type": "AddedToken"}, [3]), (None, [])):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        text = HFText(tmp_path, 5, (1, 2, 3))
        assert text_end(opened(text.tokenizer_json(), "x"), text.named("eos_token")) == ids


def test_a_start_token_the_model_does_not_have_is_refused():
    odd = post_processor(1)
    odd["special_tokens"]["a"]["ids"] = [7]
    with pytest.raises(WeightsError, match="begins a text with token 7, and the model has 5"):
        text_start(opened(tokenizer(post_processor=odd), "x"), None, 1, 5, "x")


def test_texts_that_begin_with_two_tokens_are_refused():
    step = post_processor(1, 2)
    step["single"] = [step["single"][i] for i in (0, 2, 1)]
    with pytest.raises(WeightsError, match=r"begins a text with \['a', 'b'\], expected"):
        text_start(opened(tokenizer(post_processor=step), "x"), "a", 1, 5, "x")


@pytest.mark.parametrize(
    "beside",
    [
        {"split_special_tokens": True},
        {"add_prefix_space": True, "tokenizer_class": "GPT2TokenizerFast"},
    ],
)
def test_tokenizers_that_transformers_runs_otherwise_are_refused(tmp_path, beside):
    (tmp_path / "tokenizer.json").write_text(tokenizer())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    with pytest.raises(ConfigError, match=f"{next(iter(beside))} = true is not supported"):
        HFText(tmp_path, 5, ()).tokenizer_json()


MARK = {"content": "<mark>", "lstrip": False, "rstrip": False, "normalized": False,
        "single_word": False, "special": True}  # fmt: skip


@pytest.mark.parametrize(
    "beside",
    [
        {"added_tokens_decoder": {"5": MARK}},
        {"added_tokens_decoder": {"5": {**MARK, "lstrip": True}}, "eos_token": "<mark>"},
        {"added_tokens_decoder": {"3": {**MARK, "content": "ab", "single_word": True}}},
        {"added_tokens_decoder": {"6": {**MARK, "content": "<end>"}, "5": MARK}},
        {"added_tokens_decoder": {"0": {**MARK, "content": "<unk>", "special": False}}},
        {"eos_token": "<mark>", "pad_token": "b"},
        {"image_token": "<mark>", "extra_special_tokens": ["<end>"]},
        {
            "additional_special_tokens": ["<end>"],
            "eos_token": {"__type": "AddedToken", **MARK, "lstrip": True},
        },
    ],
)
def test_added_tokens_beside_the_tokenizer_count_as_in_transformers(tmp_path, beside):
    (tmp_path / "tokenizer.json").write_text(tokenizer())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **beside})
    )
    made = AutoTokenizer.from_pretrained(tmp_path)
    read = Tokenizer.from_str(HFText(tmp_path, 9, ()).tokenizer_json())
    for text in ("ab<mark>abab", "a  <mark> b<end>ab", "ab abab", "<unk>b"):
        ids = read.encode(text, add_special_tokens=False).ids
        assert ids == made(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("given", ["\ud800", [{"name": "default", "template": "\ud800"}]])
def test_a_template_that_is_no_text_is_refused(tmp_path, given):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": given}))
    with pytest.raises(WeightsError, match=r"chat template of .* is not UTF-8 text"):
        HFText(tmp_path, 9, ()).chat_template()


@pytest.mark.parametrize("entry", [{"content": 3}, {"odd": 1}, "x", {"content": "\ud800"}])
def test_an_added_token_that_is_none_is_refused(tmp_path, entry):
    (tmp_path / "tokenizer.json").write_text(tokenizer())
    beside = json.dumps({"added_tokens_decoder": {"5": entry}})
    (tmp_path / "tokenizer_config.json").write_text(beside)
    with pytest.raises(
        (ConfigError, WeightsError), match=r"added_tokens_decoder|an added token that is none"
    ):
        HFText(tmp_path, 9, ()).tokenizer_json()


def test_a_template_for_tools_is_taken_where_tools_are_offered(tmp_path):
    default = "\n {% for m in messages %}\n{{ m['content'] }}\n  {% endfor %}\n"
    tool_use = "  {% set x = 1 %}\n\n{{ tools | length }}{{ x }} \n\n"
    named = [{"name": "default", "template": default}, {"name": "tool_use", "template": tool_use}]
    beside = tmp_path / "tokenizer_config.json"
    beside.write_text(json.dumps({"chat_template": named}))
    one = HFText(tmp_path, 9, ()).chat_template()
    messages = [{"role": "user", "content": "a"}]
    for offered, alone in ((None, default), ([{"a": 1}, {"b": 2}], tool_use)):
        made = Template(one).render(messages, tools=offered)
        assert made == Template(alone).render(messages, tools=offered)

    beside.unlink()
    (tmp_path / "chat_template.jinja").write_text(default)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(tool_use)
    assert HFText(tmp_path, 9, ()).chat_template() == one
    keys = {"tokenizer.chat_template": default, "tokenizer.chat_template.tool_use": tool_use}
    assert GGUFText(keys, "x.gguf", 9, ()).chat_template() == one


def test_a_gguf_that_changes_texts_before_they_are_split_is_refused():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 4]
    plain = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(pieces))],
    }
    # What SentencePiece would make of two spaces, had it been told to remove one.
    assert Tokenizer.from_str(hf_tokenizer_json(plain, "x.gguf") or "").encode("a  a").tokens == [
        "<s>", "▁a", "▁", "▁a",
    ]  # fmt: skip
    nothing = {"remove_extra_whitespaces": False, "precompiled_charsmap": []}
    said = {f"tokenizer.ggml.{key}": value for key, value in nothing.items()}
    assert hf_tokenizer_json(plain | said, "x.gguf") == hf_tokenizer_json(plain, "x.gguf")
    for key, value in (("remove_extra_whitespaces", True), ("precompiled_charsmap", [1, 0, 0])):
        with pytest.raises(WeightsError, match=rf"x.gguf: tokenizer.ggml.{key} asks for texts"):
            hf_tokenizer_json({**plain, f"tokenizer.ggml.{key}": value}, "x.gguf")
    with pytest.raises(ConfigError, match="remove_extra_whitespaces is 1, expected true or false"):
        hf_tokenizer_json({**plain, "tokenizer.ggml.remove_extra_whitespaces": 1}, "x.gguf")
