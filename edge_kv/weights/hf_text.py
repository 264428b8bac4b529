"""What a Hugging Face directory says beside its weights: tokenizer, template, ids, sampling."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from edge_kv.weights.fields import Fields
from edge_kv.weights.hf_files import read_json, read_text
from edge_kv.weights.source import Generation, turn_end_ids

_TEXTS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip


class HFText:
    """The files beside the weights in the directory `root`, for a model of `vocab` tokens."""

    vocab: int
    eos: tuple[int, ...]

    def __init__(self, root: Path, vocab: int, eos: tuple[int, ...]):
        self._root, self.vocab, self.eos = root, vocab, eos

    def tokenizer_json(self) -> str | None:
        return self._text("tokenizer.json")

    def chat_template(self) -> str | None:
        if (text := self._text("chat_template.jinja")) is not None:
            return text
        for file in ("tokenizer_config.json", "chat_template.json"):
            found = (self._json(file) or {}).get("chat_template")
            if isinstance(found, list):  # several named templates
                default = (t.get("template") for t in _objects(found) if t.get("name") == "default")
                found = next(default, None)
            if isinstance(found, str):
                return found
        return None

    def stop_ids(self) -> list[int]:
        known = self.eos
        ids = self._generation.token_ids("eos_token_id", self.vocab)
        return sorted({i for i in (*ids, *turn_end_ids(self._tokens, known)) if i not in known})

    def generation(self) -> Generation:
        fields, n = self._generation, self.vocab
        greedy = fields.get("do_sample") is False
        return Generation(
            temperature=0.0 if greedy else fields.positive("temperature", or_zero=True),
            top_k=fields.count("top_k"),
            top_p=fields.positive("top_p", at_most=1.0),
            min_p=fields.positive("min_p", at_most=1.0, or_zero=True),
            repetition_penalty=fields.positive("repetition_penalty"),
            suppress_tokens=fields.token_ids("suppress_tokens", n),
        )

    @cached_property
    def _generation(self) -> Fields:
        raw = self._json("generation_config.json") or {}
        return Fields(raw, str(self._root / "generation_config.json"))

    @cached_property
    def _tokens(self) -> dict[str, int]:
        """Added token -> id of tokenizer.json."""
        added = (self._json("tokenizer.json") or {}).get("added_tokens")
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
