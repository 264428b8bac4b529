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
from edge_kv.weights.hf_config import config_from_hf
from edge_kv.weights.safetensors_file import open_safetensors
from edge_kv.weights.source import Checkpoint, Stored, turn_end_ids

# Where the text model sits: multimodal, older multimodal, text-only, bare decoder.
_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
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


class HFDirectory(Checkpoint):
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
        config = config_from_hf(raw, str(root / "config.json"))
        stored = _open_shards(root, self._json("model.safetensors.index.json"))
        prefix = next((p for p in _PREFIXES if p + "embed_tokens.weight" in stored), "model.")
        names = {spec.name: (prefix + hf_name(spec.name),) for spec in tensor_table(config)}
        used = {own for parts in names.values() for own in parts}
        super().__init__(
            config,
            label or f"directory {root.name}",
            stored=stored,
            names=names,
            surplus=sorted(n for n in stored if n not in used and not _dead(n, prefix, config)),
            # transformers' Gemma3RMSNorm multiplies by 1 + weight, Gemma4RMSNorm by weight.
            norm_offset=1.0 if config.family == "gemma3" else 0.0,
        )

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
        known = self.config.eos_ids
        raw = self._json("generation_config.json") or {}
        ids = Fields(raw, str(self._root / "generation_config.json")).ids("eos_token_id")
        return sorted({i for i in (*ids, *turn_end_ids(self._tokens, known)) if i not in known})

    @cached_property
    def _tokens(self) -> dict[str, Any]:
        """Added token -> id of tokenizer.json."""
        added = (self._json("tokenizer.json") or {}).get("added_tokens")
        entries = added if isinstance(added, list) else []
        return {t["content"]: t["id"] for t in entries if isinstance(t, dict)}

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


def hf_name(name: str) -> str:
    """Canonical name -> name inside the text model of a Hugging Face checkpoint."""
    if name in _MODEL:
        return _MODEL[name]
    _, layer, rest = name.split(".", 2)
    if rest.startswith("attn."):
        rest = "self_attn." + rest.removeprefix("attn.")
    return f"layers.{layer}.{_LAYER.get(rest, rest)}"


def _open_shards(root: Path, index: dict[str, Any] | None) -> dict[str, Stored]:
    """Every tensor of every shard; the index, if there is one, says which files belong."""
    files: list[Path]
    listed: dict[str, Any] = {}
    if index is not None:
        listed = index.get("weight_map")  # type: ignore[assignment]
        if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
            raise WeightsError(
                f"{root / 'model.safetensors.index.json'} has no weight_map; download it again."
            )
        shards = sorted(set(listed.values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise WeightsError(
                    f"{root / 'model.safetensors.index.json'} names {shard!r}, a path outside the "
                    "directory; refused."
                )
        files = [root / shard for shard in shards]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise WeightsError(
                f"{root} lacks {len(missing)} of {len(files)} shards ({', '.join(missing[:3])}"
                f"{', …' if len(missing) > 3 else ''}); download them again."
            )
    else:
        files = sorted(root.glob("*.safetensors"))
        if not files:
            raise WeightsError(
                f"{root} has no .safetensors file; edge-kv reads safetensors and GGUF, "
                "convert the checkpoint."
            )
    stored: dict[str, Stored] = {}
    for file in files:
        tensors = open_safetensors(file)
        twice = sorted(set(tensors) & set(stored))
        if twice:
            raise WeightsError(
                f"{file} repeats {twice[0]!r} of another shard; keep the files of one checkpoint."
            )
        stored.update(tensors)
    return stored


def _dead(name: str, prefix: str, config: ModelConfig) -> bool:
    """Tensors that published checkpoints carry and the text decoder does not use."""
    if _TOWERS & set(name.split(".")):
        return True
    if name in ("lm_head.weight", "language_model.lm_head.weight"):  # a copy: tied (config.json)
        return True
    parts = name.removeprefix(prefix).split(".")
    if len(parts) != 5 or parts[0] != "layers" or parts[2] != "self_attn":
        return False
    sharing = parts[1].isdigit() and config.n_own <= int(parts[1]) < config.n_layers
    return sharing and parts[3] in ("k_proj", "v_proj", "k_norm", "v_norm")
