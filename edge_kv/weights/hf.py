"""A local Hugging Face directory: config.json, safetensors, tokenizer and chat template."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from edge_kv.config import ModelConfig
from edge_kv.errors import WeightsError
from edge_kv.tensors import tensor_table
from edge_kv.weights.fields import Fields
from edge_kv.weights.hf_config import config_from_hf, ple_rows
from edge_kv.weights.hf_files import open_files, weight_files
from edge_kv.weights.source import Checkpoint, Generation, Stored, filled_up, turn_end_ids

# Where the text model sits: multimodal, older multimodal, text-only, bare decoder.
_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
# What an export reads beside config.json and the weights.
_TEXTS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
# Parts of multimodal checkpoints that the text decoder does not use.
_TOWERS = {
    "vision_tower", "audio_tower", "embed_vision", "embed_audio", "vision_embedder",
    "multi_modal_projector",
}  # fmt: skip

_MODEL = {
    "embed.weight": "embed_tokens.weight",
    "ple_embed.weight": "embed_tokens_per_layer.weight",
    "ple_proj.weight": "per_layer_model_projection.weight",
    "ple_norm.weight": "per_layer_projection_norm.weight",
    "norm.weight": "norm.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attn_norm.weight": "post_attention_layernorm.weight",
    "mlp_norm.weight": "pre_feedforward_layernorm.weight",
    "post_mlp_norm.weight": "post_feedforward_layernorm.weight",
    "moe.dense_norm.weight": "post_feedforward_layernorm_1.weight",
    "moe.in_norm.weight": "pre_feedforward_layernorm_2.weight",
    "moe.out_norm.weight": "post_feedforward_layernorm_2.weight",
    "moe.router.scale": "router.scale",
    "moe.router.proj.weight": "router.proj.weight",
    "moe.router.expert_scale": "router.per_expert_scale",
    "moe.gate_up": "experts.gate_up_proj",
    "moe.down": "experts.down_proj",
    "ple.gate.weight": "per_layer_input_gate.weight",
    "ple.proj.weight": "per_layer_projection.weight",
    "ple.norm.weight": "post_per_layer_input_norm.weight",
    "scalar": "layer_scalar",
}


class HFText:
    """What a Hugging Face directory says beside its weights: tokenizer, template, ids, sampling."""

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
                named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
                found = named.get("default")
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
        entries = [t for t in added if isinstance(t, dict)] if isinstance(added, list) else []
        found = {t.get("content"): t.get("id") for t in entries}
        known = range(self.vocab)
        return {
            t: i
            for t, i in found.items()
            if isinstance(t, str) and isinstance(i, int) and i in known
        }

    def _text(self, name: str) -> str | None:
        path = self._root / name
        if not path.is_file():
            return None
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise WeightsError(f"{path} cannot be read as text ({e}); download it again.") from e

    def _json(self, name: str) -> dict[str, Any] | None:
        text = self._text(name)
        if text is None:
            return None
        path = self._root / name
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise WeightsError(f"{path} is not valid JSON ({e}); download it again.") from e
        if not isinstance(value, dict):
            raise WeightsError(f"{path} is not a JSON object; download it again.")
        return value


class HFDirectory(HFText, Checkpoint):
    """A checkpoint directory as `save_pretrained` or the hub lays it out.

    Raises:
        WeightsError: a file is missing, cut off or not what its name says.
        ConfigError: config.json describes a model that is not supported.
    """

    def __init__(self, root: Path, label: str = ""):
        self._root = root
        raw = self._json("config.json")
        if raw is None:
            raise WeightsError(
                f"{root} has no config.json; give a directory with config.json and safetensors, "
                "a .gguf file, a hub id or `random`."
            )
        where = str(root / "config.json")
        config = config_from_hf(raw, where)
        HFText.__init__(self, root, config.vocab_size, config.eos_ids)
        self._files = weight_files(root, raw.get("transformers_weights"))
        stored = open_files(self._files)
        prefix = next((p for p in _PREFIXES if p + "norm.weight" in stored), "model.")
        names = {spec.name: (prefix + hf_name(spec.name),) for spec in tensor_table(config)}
        table, heads = names["embed.weight"][0], [h for h in _HEADS if h in stored]
        if table not in stored and heads:  # tied weights are stored under either name
            names["embed.weight"] = (heads.pop(0),)
        if config.ple_dim:
            self._fit_ple(stored, names["ple_embed.weight"][0], ple_rows(raw, where), config)
        used = {own for parts in names.values() for own in parts} | set(heads)
        Checkpoint.__init__(
            self,
            config,
            label or f"directory {root.resolve().name}",
            stored=stored,
            names=names,
            surplus=sorted(n for n in stored if n not in used and not _dead(n, prefix, config)),
            heads=heads,
            # transformers' Gemma3RMSNorm multiplies by 1 + weight, Gemma4RMSNorm by weight.
            norm_offset=1.0 if config.family == "gemma3" else 0.0,
        )

    def files(self) -> list[Path]:
        texts = (self._root / name for name in ("config.json", *_TEXTS))
        return [*(path for path in texts if path.is_file()), *self._files]

    def _fit_ple(self, stored: dict[str, Stored], own: str, rows: int, config: ModelConfig) -> None:
        """Give the per-layer table a row for every token.

        A token table that was resized may be longer: tokens past the per-layer table read the
        padding token's row, as in Gemma 3n.
        """
        table = stored.get(own)
        if table and rows != config.vocab_size and table.shape[:1] == (rows,):
            stored[own] = filled_up(table, config.vocab_size, min(config.pad_id, rows - 1))


def hf_name(name: str) -> str:
    """Canonical name -> name inside the text model of a Hugging Face checkpoint."""
    if name in _MODEL:
        return _MODEL[name]
    _, layer, rest = name.split(".", 2)
    if rest.startswith("attn."):
        rest = "self_attn." + rest.removeprefix("attn.")
    return f"layers.{layer}.{_LAYER.get(rest, rest)}"


def _dead(name: str, prefix: str, config: ModelConfig) -> bool:
    """Tensors that published checkpoints carry and the text decoder does not use."""
    if _TOWERS & set(name.split(".")):
        return True
    parts = name.removeprefix(prefix).split(".")
    if len(parts) != 5 or parts[0] != "layers" or parts[2] != "self_attn":
        return False
    sharing = parts[1].isdigit() and config.n_own <= int(parts[1]) < config.n_layers
    return sharing and parts[3] in ("k_proj", "v_proj", "k_norm", "v_norm")
