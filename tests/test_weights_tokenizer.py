"""Tokenizers are tried before an export, and hold no token that the model has no row for."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from edge_kv.errors import WeightsError
from edge_kv.weights.tokenizer import usable_tokenizer

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


def test_pieces_beyond_the_rows_are_spelt_with_smaller_ones():
    fitted = Tokenizer.from_str(usable_tokenizer(tokenizer(), 4, "x"))
    assert fitted.encode("abab").ids == [3, 3]


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
