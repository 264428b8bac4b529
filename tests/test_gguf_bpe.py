"""Byte-level tokenizers from GGUF metadata against tokenizers made the usual way."""

from __future__ import annotations

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edge_kv.errors import WeightsError
from edge_kv.weights.gguf_tokenizer import hf_tokenizer_json

TEXTS = (
    "Hello, world! It's 2024, isn't it?  Two  spaces,\ttabs\n\nand lines.\r\n",
    "Grüße aus Köln — naïve café, 日本語 текст 🙂🙂🏽",
    "e\u0301 composed or not: é",
    "def f(x):\n    return x**2 + 10000000 # 1,234,567",
    "We'LL'll THEY'RE don't   ",
    "",
    " ",
    "\n \n",
)
# pre: what the tokenizers package offers for the same rule
PRE = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ],
    "qwen2": [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
                r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def trained(pre):
    """A small byte-level tokenizer with the rule `pre`, trained on the texts."""
    made = Tokenizer(models.BPE())
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(PRE[pre])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return made


def metadata_of(made, rule, **more):
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    keys = {
        "model": "gpt2", "pre": rule, "tokens": tokens, "merges": merges, "bos_token_id": 1,
        "token_type": [3, 3, 3] + [1] * (len(tokens) - 3), "add_bos_token": False, **more,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


@pytest.mark.parametrize("pre", PRE)
def test_ids_and_text_are_the_same(pre):
    made = trained(pre)
    read = Tokenizer.from_str(hf_tokenizer_json(metadata_of(made, pre), "x.gguf"))
    for text in (*TEXTS, f"<|im_start|>user\n{TEXTS[0]}<|im_end|>\n"):
        ids = made.encode(text).ids
        assert read.encode(text).ids == ids, text
        assert read.decode(ids) == made.decode(ids)
    assert read.encode("<|im_end|>").ids == [2]
    if pre == "smollm":
        assert len(read.encode("2024").ids) == 4


def test_llama3_begins_with_bos_and_takes_whole_pieces():
    made = trained("gpt-2")
    metadata = metadata_of(made, "llama-bpe", add_bos_token=None)
    read = Tokenizer.from_str(hf_tokenizer_json(metadata, "x.gguf"))
    assert read.encode("Hello").ids[0] == 1
    assert read.encode("Hello", add_special_tokens=False).ids[0] != 1
    assert json.loads(read.to_str())["model"]["ignore_merges"] is True
    pieces = [text for text, _ in read.pre_tokenizer.pre_tokenize_str("a 12345 b")]
    assert pieces == ["a", "Ġ", "123", "45", "Ġb"]
    quiet = metadata_of(made, "llama-bpe")
    assert Tokenizer.from_str(hf_tokenizer_json(quiet, "x.gguf")).encode("Hello").ids[0] != 1


FAULTS = [
    ({"pre": "smollm2"}, r"tokenizer.ggml.pre 'smollm2' is not supported. Did you mean 'smollm'"),
    ({"pre": None}, r"tokenizer.ggml.pre None is not supported"),
    ({"pre": 3}, r"tokenizer.ggml.pre 3 is not supported"),
    ({"merges": ["a zzz"]}, r"the merge 'a zzz' does not join two tokens"),
    ({"token_type": [1]}, r"token_type has 1 entries"),
    ({"tokens": ["a", "a"], "token_type": None}, r"repeats a token"),
    ({"model": "rwkv"}, r"tokenizer.ggml.model 'rwkv' is not supported"),
]


@pytest.mark.parametrize("change, message", FAULTS, ids=[m for _, m in FAULTS])
def test_faults_are_named(change, message):
    metadata = metadata_of(trained("gpt-2"), "gpt-2", **change)
    with pytest.raises(WeightsError, match=message):
        hf_tokenizer_json(metadata, "x.gguf")
