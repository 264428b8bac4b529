"""What a Hugging Face directory says beside its weights: tokenizer, template, ids, sampling."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from edge_kv.errors import WeightsError
from edge_kv.weights.fields import Fields
from edge_kv.weights.hf_files import parsed, read_json, read_text
from edge_kv.weights.source import (
    TOOL_USE,
    Generation,
    one_template,
    said_otherwise,
    turn_end_ids,
)
from edge_kv.weights.tokenizer import with_added

_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_TEXTS = (
    "generation_config.json", "tokenizer.json", _CONFIG, _SPECIAL, "chat_template.jinja", TOOL_USE,
    "chat_template.json",
)  # fmt: skip

# Classes of transformers that make their steps anew and put a space before a text if told so.
_BUILT_ANEW = ("GPT2Tokenizer", "Qwen2Tokenizer")
_TOP_K = 50  # transformers' own, where a checkpoint that is to be sampled says none
# What transformers' `generate` also does to a text, with the value that does nothing (None: any
# does something). Settings of length and speed are not among them: a request decides those.
_ALWAYS = {
    "begin_suppress_tokens": None, "constraints": None, "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1,
    "exponential_decay_length_penalty": None, "force_words_ids": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": 1,
    "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "num_beams": 1,
    "sequence_bias": None, "stop_strings": None, "token_healing": None,
    "watermarking_config": None,
}  # fmt: skip
_SAMPLING = {"epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": None, "typical_p": 1}
_GREEDY = {"penalty_alpha": 0}


class HFText:
    """The files beside the weights in the directory `root`, for a model of `vocab` tokens."""

    vocab: int
    eos: tuple[int, ...]

    def __init__(self, root: Path, vocab: int, eos: tuple[int, ...]):
        self._root, self.vocab, self.eos = root, vocab, eos

    def tokenizer_json(self) -> str | None:
        return self._tokenizer

    def named(self, role: str) -> str | None:
        if role not in self._beside.values:
            return None
        token = self._beside.get(role) or ""
        if isinstance(token, dict):
            token = token.get("content")
        if not isinstance(token, str):
            raise self._beside.fault(role, "a text")
        return token

    def chat_template(self) -> str | None:
        template = self._template()
        try:
            (template or "").encode()
        except UnicodeError as e:  # half of a surrogate pair can stand in JSON
            raise WeightsError(
                f"The chat template of {self._root} is not UTF-8 text; download it again."
            ) from e
        return template

    def _template(self) -> str | None:
        if (text := self._text("chat_template.jinja")) is not None:
            return one_template(text, self._text(TOOL_USE))
        for file in (_CONFIG, "chat_template.json"):
            found = (self._json(file) or {}).get("chat_template")
            if isinstance(found, str):
                return found
            named = {str(t.get("name")): t.get("template") for t in _objects(found)}
            default, tools = named.get("default"), named.get("tool_use")
            if isinstance(default, str):
                return one_template(default, tools if isinstance(tools, str) else None)
        return None

    def stop_ids(self) -> list[int]:
        known = self.eos
        ids = self._generation.token_ids("eos_token_id", self.vocab)
        return sorted({i for i in (*ids, *turn_end_ids(self._tokens, known)) if i not in known})

    def generation(self) -> Generation:
        """By transformers' rules: greedy unless `do_sample` says otherwise."""
        fields, n = self._generation, self.vocab
        sampled = fields.flag("do_sample")
        temperature = fields.positive("temperature", or_zero=True)
        top_k = fields.count("top_k")
        if sampled:
            temperature = 1.0 if temperature is None else temperature
            top_k = _TOP_K if top_k is None else top_k
        words, single = fields.get("bad_words_ids"), self._bad_words()
        rest = {**fields.values, "bad_words_ids": None if single is not None else words}
        own = _SAMPLING if sampled else _GREEDY
        return Generation(
            temperature=temperature if sampled else 0.0,
            top_k=top_k,
            top_p=fields.positive("top_p", at_most=1.0),
            min_p=fields.positive("min_p", at_most=1.0, or_zero=True),
            repetition_penalty=fields.positive("repetition_penalty"),
            suppress_tokens=(*fields.token_ids("suppress_tokens", n), *(single or ())),
            unused=said_otherwise(rest, {"bad_words_ids": None, **_ALWAYS, **own}),
        )

    def _bad_words(self) -> tuple[int, ...] | None:
        """`bad_words_ids` as ids never to be chosen, where each word is of one token; without end
        tokens, which transformers leaves out too."""
        words = self._generation.get("bad_words_ids")
        if not isinstance(words, list) or not all(
            isinstance(w, list) and len(w) == 1 for w in words
        ):
            return None
        ids = Fields({"bad_words_ids": [w[0] for w in words]}, self._generation.where)
        ends = {*self.eos, *self._generation.token_ids("eos_token_id", self.vocab)}
        return tuple(i for i in ids.token_ids("bad_words_ids", self.vocab) if i not in ends)

    @cached_property
    def _generation(self) -> Fields:
        """generation_config.json; without one, transformers looks into config.json."""
        name = "generation_config.json"
        raw = self._json(name)
        if raw is None:
            name = "config.json"
            whole = self._json(name) or {}
            inner = whole.get("text_config")
            said = {key: value for key, value in whole.items() if value is not None}
            raw = {**(inner if isinstance(inner, dict) else {}), **said}
        return Fields(raw, str(self._root / name))

    @cached_property
    def _tokenizer(self) -> str | None:
        """tokenizer.json with the added tokens that are listed beside it."""
        self._beside.refuse_unless("split_special_tokens", False)
        if str(self._beside.get("tokenizer_class")).removesuffix("Fast") in _BUILT_ANEW:
            self._beside.refuse_unless("add_prefix_space", False)
        content, listed = self._text("tokenizer.json"), self._beside.get("added_tokens_decoder")
        by_id = listed if isinstance(listed, dict) else {}
        if not all(i.isdecimal() and isinstance(token, dict) for i, token in by_id.items()):
            raise self._beside.fault("added_tokens_decoder", "an object of tokens by id")
        entries, special = [by_id[i] for i in sorted(by_id, key=int)], self._special()
        if content is None or not (entries or special):
            return content
        return with_added(content, entries, special, str(self._root))

    def _special(self) -> list[str | dict[str, Any]]:
        """Special tokens that are named beside the tokenizer: one a role, and lists of further."""
        values = self._beside.values
        named = [v for key, v in values.items() if key.endswith("_token")]
        for key in ("extra_special_tokens", "additional_special_tokens"):
            further = values.get(key)
            named += further.values() if isinstance(further, dict) else []
            named += further if isinstance(further, list) else []
        return [v for v in named if isinstance(v, dict) or (isinstance(v, str) and v)]

    @cached_property
    def _beside(self) -> Fields:
        """tokenizer_config.json; without a list of added tokens the older file counts before it."""
        raw = self._json(_CONFIG) or {}
        if "added_tokens_decoder" not in raw:
            raw = {**raw, **(self._json(_SPECIAL) or {})}
        return Fields(raw, str(self._root / _CONFIG))

    @cached_property
    def _tokens(self) -> dict[str, int]:
        """Added token -> id of the tokenizer."""
        added = parsed(self._tokenizer or "{}", self._root / "tokenizer.json").get("added_tokens")
        found = [(t.get("content"), t.get("id")) for t in _objects(added)]
        known = range(self.vocab)
        return {t: i for t, i in found if isinstance(t, str) and type(i) is int and i in known}

    def files(self) -> list[Path]:
        """What it reads, as far as it is there."""
        return [path for name in _TEXTS if (path := self._root / name).is_file()]

    def _text(self, name: str) -> str | None:
        return read_text(self._root / name)

    def _json(self, name: str) -> dict[str, Any] | None:
        return read_json(self._root / name)


def _objects(listed: Any) -> list[dict[str, Any]]:
    """The objects of a JSON list; none of anything else."""
    return [x for x in listed if isinstance(x, dict)] if isinstance(listed, list) else []
