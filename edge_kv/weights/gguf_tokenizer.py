"""A Hugging Face `tokenizer.json` from GGUF metadata.

Gemma's tokenizer is one SentencePiece BPE in two GGUF spellings. Gemma 3 files ("llama") store a
score for each piece: SentencePiece merges the neighbours whose union scores best, which is a BPE
whose merges are ranked by the score of what they make. Gemma 4 files ("gemma4") store merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

from edge_kv.errors import WeightsError
from edge_kv.weights.fields import Fields
from edge_kv.weights.gguf_bpe import adds_bos_by_default, byte_level

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # llama.cpp's token types
# Tokens that mark turns, channels, tools and media. Files of fine-tunes give them any type.
_MARKS = re.compile(
    r"<(start|end)_of_(turn|image)>|<bos>|<eos>|<pad>|<\|[^\s<>|]+\|?>|<[^\s<>|]+\|>"
)


def default_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """The special tokens of a SentencePiece file that does not name them: llama.cpp's own, or
    those of every Gemma; none of a byte-level one."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gemma4" or str(metadata.get("general.architecture")).startswith("gemma"):
        return {"padding_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "unknown_token_id": 3}
    if kind == "llama":
        return {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {}


def _unsaid(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What holds where a file does not say it: as in llama.cpp, SentencePiece begins with a space,
    and Gemma 4's own kind does not."""
    spaced = metadata.get("tokenizer.ggml.model") == "llama"
    return {**default_ids(metadata), "add_space_prefix": spaced}


def hf_tokenizer_json(metadata: Mapping[str, Any], where: str) -> str | None:
    """Content of a `tokenizer.json` that gives the same ids; None without a tokenizer.

    Args:
        metadata: the GGUF file's key-value pairs.
        where: what messages call the file.

    Raises:
        WeightsError: another tokenizer model, texts that it would change beforehand, or lists that
            do not fit each other.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        return None
    if model not in ("llama", "gemma4", "gpt2"):
        raise WeightsError(
            f"{where}: tokenizer.ggml.model {model!r} is not supported; "
            "edge-kv reads 'llama' (SentencePiece), 'gemma4' and 'gpt2' (byte-level BPE)."
        )
    _check_text_is_kept(metadata, where)
    if model == "gpt2":
        return _byte_level(metadata, where)
    tokens = _strings(metadata, "tokens", where)
    # llama.cpp's converter writes runs of spaces as spaces; the pieces are runs of ▁.
    tokens = [t if t.strip(" ") else t.replace(" ", _SPACE) for t in tokens]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise WeightsError(f"{where}: tokenizer.ggml.tokens repeats a token; convert it again.")
    kinds = _kinds(metadata.get("tokenizer.ggml.token_type"), tokens, where)
    if model == "llama":
        merges = _merges_of_scores(
            tokens, vocab, kinds, metadata.get("tokenizer.ggml.scores"), where
        )
    else:
        merges = _stored_merges(_strings(metadata, "merges", where), vocab, where)
    fields = Fields(metadata, where, _unsaid(metadata), "tokenizer.ggml.")
    unknown = fields.integer("unknown_token_id")
    if not 0 <= unknown < len(tokens):
        raise WeightsError(f"{where}: the unknown token {unknown} is not one of {len(tokens)}.")
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added_tokens(tokens, kinds),
            "normalizer": _normalizer(fields),
            "pre_tokenizer": None,
            "post_processor": _post_processor(fields, tokens),
            "decoder": _decoder(fields),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": tokens[unknown],
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": merges,
            },
        },
        ensure_ascii=False,
    )


def _check_text_is_kept(metadata: Mapping[str, Any], where: str) -> None:
    """Refuse what SentencePiece may do to a text before it looks for pieces. No model that is read
    here asks for it, and other readers pass over it and make other ids than the file means.
    """
    fields = Fields(metadata, where, prefix="tokenizer.ggml.")
    asked = {
        "remove_extra_whitespaces": fields.flag("remove_extra_whitespaces"),
        "precompiled_charsmap": fields.get("precompiled_charsmap") not in (None, [], ""),
    }
    for key in (key for key, said in asked.items() if said):
        raise WeightsError(
            f"{where}: tokenizer.ggml.{key} asks for texts to be changed before they are split, "
            "which edge-kv does not do; use the checkpoint with its tokenizer.json."
        )


def _byte_level(metadata: Mapping[str, Any], where: str) -> str:
    tokens = _strings(metadata, "tokens", where)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise WeightsError(f"{where}: tokenizer.ggml.tokens repeats a token; convert it again.")
    kinds = _kinds(metadata.get("tokenizer.ggml.token_type"), tokens, where)
    merges = _stored_merges(_strings(metadata, "merges", where), vocab, where)
    document = byte_level(metadata, vocab, merges, _added_tokens(tokens, kinds), where)
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos_by_default(metadata))
    fields = Fields({**metadata, "tokenizer.ggml.add_bos_token": adds_bos}, where,
                    prefix="tokenizer.ggml.")  # fmt: skip
    document["post_processor"] = _post_processor(fields, tokens)
    return json.dumps(document, ensure_ascii=False)


def _merges_of_scores(
    tokens: list[str], vocab: dict[str, int], kinds: list[int], scores: Any, where: str
) -> list[tuple[str, str]]:
    """Every way to make a piece from two others, best piece first, longest left part first.

    SentencePiece finds user-defined pieces before it merges anything, the longest first. Those that
    are runs of spaces are made by merges that rank above every score: with the longest left part
    first of all, a run grows from the left until no longer piece is there.
    """
    if (
        not isinstance(scores, list)
        or len(scores) != len(tokens)
        or not all(isinstance(s, (int, float)) and isfinite(s) for s in scores)
    ):
        raise WeightsError(
            f"{where}: tokenizer.ggml.scores must hold a finite score for each of "
            f"{len(tokens)} tokens; convert it again."
        )
    runs: list[tuple[str, str]] = []
    merges: list[tuple[str, str]] = []
    for i in sorted(range(len(tokens)), key=lambda i: -scores[i]):  # stable: ties keep id order
        token = tokens[i]
        run = kinds[i] == _USER_DEFINED and not token.strip(_SPACE)
        if not run and kinds[i] != _NORMAL:  # found in the raw text, or made of a byte
            continue
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                (runs if run else merges).append((left, right))
    return sorted(runs, key=lambda m: (-len(m[0]), -len(m[1]))) + merges


def _stored_merges(merges: list[str], vocab: dict[str, int], where: str) -> list[tuple[str, str]]:
    """`left right` lines."""
    found: list[tuple[str, str]] = []
    for line in merges:
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or not (left in vocab and right in vocab and left + right in vocab):
            raise WeightsError(
                f"{where}: the merge {line!r} does not join two tokens to a third; "
                "convert it again."
            )
        found.append((left, right))
    return found


def _kinds(stored: Any, tokens: list[str], where: str) -> list[int]:
    """A type for each token: as stored, but marks are control tokens whatever the file says."""
    kinds = stored or [_NORMAL] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        n = len(kinds) if isinstance(kinds, list) else 0
        raise WeightsError(
            f"{where}: tokenizer.ggml.token_type has {n} entries for {len(tokens)} "
            "tokens; convert it again."
        )
    if not all(isinstance(kind, int) for kind in kinds):
        raise WeightsError(
            f"{where}: tokenizer.ggml.token_type must hold whole numbers; convert it again."
        )
    return [
        _CONTROL if kind != _UNKNOWN and _MARKS.fullmatch(token) else kind
        for kind, token in zip(kinds, tokens, strict=True)
    ]


def _added_tokens(tokens: list[str], kinds: list[int]) -> list[dict[str, Any]]:
    """Control and user-defined pieces: found in the raw text before anything is merged.

    Not runs of ▁: in raw text they are spaces, and the first merges make them.
    """
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token.strip(_SPACE)
    ]


def _normalizer(fields: Fields) -> dict[str, Any]:
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if not fields.flag("add_space_prefix"):
        return spaces
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, spaces]}


def _decoder(fields: Fields) -> dict[str, Any]:
    """The way back: the space that a text was begun with is not of the text."""
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if fields.flag("add_space_prefix"):
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _post_processor(fields: Fields, tokens: list[str]) -> dict[str, Any] | None:
    """`<bos>` before a text, unless the file says otherwise (Gemma's tokenizer adds it)."""
    if fields.get("add_bos_token") is not None and not fields.flag("add_bos_token"):
        return None
    bos = fields.integer("bos_token_id")
    if not 0 <= bos < len(tokens):
        raise fields.fault("bos_token_id", f"one of {len(tokens)} tokens")
    name = tokens[bos]

    def template(part: str, kind: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": name, "type_id": kind}},
            {"Sequence": {"id": part, "type_id": kind}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": template("A", 0) + template("B", 1),
        "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}},
    }


def _strings(metadata: Mapping[str, Any], key: str, where: str) -> list[str]:
    found = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
        raise WeightsError(f"{where}: tokenizer.ggml.{key} must be a list of texts; convert again.")
    return found
