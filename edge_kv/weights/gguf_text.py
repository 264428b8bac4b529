"""What a GGUF file says beside its weights: tokenizer, template, ids, sampling."""

from __future__ import annotations

from typing import Any

from edge_kv.weights.fields import Fields
from edge_kv.weights.gguf_tokenizer import hf_tokenizer_json
from edge_kv.weights.source import Generation, one_template, said_otherwise, turn_end_ids

# Tokens beside those of `turn_end_ids` that end a text whatever the ids in the metadata are, as in
# llama.cpp. Not "</s>", which it has among them too: Gemma's vocabulary has it as a mark of HTML.
_ENDS = (
    "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|end|>", "<|endoftext|>",
    "<EOT>",
)  # fmt: skip

# What llama.cpp's samplers also do, with the value that does nothing.
_OTHERS = {"sequence": None, "xtc_probability": 0, "mirostat": 0}


class GGUFText:
    """The metadata of the file called `where`, for a model of `vocab` tokens."""

    def __init__(self, metadata: dict[str, Any], where: str, vocab: int, eos: tuple[int, ...]):
        self._metadata, self._where, self.vocab, self.eos = metadata, where, vocab, eos
        self._tokenizer: str | None = None

    def tokenizer_json(self) -> str | None:
        if self._tokenizer is None:
            self._tokenizer = hf_tokenizer_json(self._metadata, self._where)
        return self._tokenizer

    def named(self, role: str) -> None:
        """The ids in the metadata say it."""

    def chat_template(self) -> str | None:
        template = self._metadata.get("tokenizer.chat_template")
        tools = self._metadata.get("tokenizer.chat_template.tool_use")
        if not isinstance(template, str):
            return None
        return one_template(template, tools if isinstance(tools, str) else None)

    def stop_ids(self) -> list[int]:
        fields, n = Fields(self._metadata, self._where), self.vocab
        known = self.eos
        listed = self._metadata.get("tokenizer.ggml.tokens")
        tokens = enumerate(listed) if isinstance(listed, list) else ()
        by_name = {t: i for i, t in tokens if isinstance(t, str)}
        ids = {
            *fields.token_ids("tokenizer.ggml.eot_token_id", n),
            *fields.token_ids("tokenizer.ggml.eom_token_id", n),
            *turn_end_ids(by_name, known),
            *(by_name[name] for name in _ENDS if by_name.get(name, n) < n),
        }
        return sorted(ids - set(known))

    def generation(self) -> Generation:
        """Sampled where the file says anything about it: its converter leaves out whether to."""
        fields = Fields(self._metadata, self._where, prefix="general.sampling.")
        temperature = fields.positive("temp", or_zero=True)
        top_k, top_p = fields.count("top_k"), fields.positive("top_p", at_most=1.0)
        min_p = fields.positive("min_p", at_most=1.0, or_zero=True)
        if temperature is None and any(f is not None for f in (top_k, top_p, min_p)):
            temperature = 1.0
        return Generation(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=fields.positive("penalty_repeat"),
            unused=said_otherwise({name: fields.get(name) for name in _OTHERS}, _OTHERS),
        )
