"""A byte-level BPE `tokenizer.json` from GGUF metadata: GPT-2's kind, of Llama 3, Qwen and SmolLM.

A file stores the pieces, their merges and the name of the rule that splits text beforehand
(`tokenizer.ggml.pre`); the rules are those of the tokenizers the names stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_kv.errors import WeightsError, did_you_mean

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Rule:
    """How text is split before it is merged."""

    pattern: str
    digits: bool = False  # each digit is split off first
    nfc: bool = False  # text is composed (Unicode NFC)
    whole: bool = False  # a piece that is a token is not built from merges
    bos: bool = False  # a text begins with the token for it, unless the file says otherwise


_RULES = {
    "gpt-2": _Rule(_GPT2),
    "smollm": _Rule(_GPT2, digits=True),
    "llama-bpe": _Rule(_WORDS % "{1,3}", whole=True, bos=True),
    "qwen2": _Rule(_WORDS % "", nfc=True),
}


def adds_bos_by_default(metadata: Mapping[str, Any]) -> bool:
    """Whether a file that says nothing about it means texts that begin with the bos token."""
    rule = _RULES.get(metadata.get("tokenizer.ggml.pre", ""))
    return rule is not None and rule.bos


def byte_level(
    metadata: Mapping[str, Any],
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    added: list[dict[str, Any]],
    where: str,
) -> dict[str, Any]:
    """The document of a tokenizer whose model is called "gpt2".

    Raises:
        WeightsError: a rule for splitting text that is not known.
    """
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in _RULES:
        raise WeightsError(
            f"{where}: tokenizer.ggml.pre {name!r} is not supported."
            + did_you_mean(str(name), _RULES)
        )
    rule = _RULES[name]
    split = {
        "type": "Split", "pattern": {"Regex": rule.pattern}, "behavior": "Isolated",
        "invert": False,
    }  # fmt: skip
    steps = [{"type": "Digits", "individual_digits": True}] if rule.digits else []
    to_bytes = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False,
    }  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if rule.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, split, to_bytes]},
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule.whole,
            "vocab": vocab,
            "merges": merges,
        },
    }  # fmt: skip
