"""Checkpoints behind one small reader: HF directory, GGUF file, hub id, or seeded random weights.

Nothing here imports torch, and a format's own libraries are imported when such a file is opened.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from edge_kv.config import ModelConfig
from edge_kv.errors import ConfigError, WeightsError
from edge_kv.tensors import TensorSpec, tensor_table
from edge_kv.weights.hub import download, is_hub_id
from edge_kv.weights.source import WeightSource, first_not_finite

__all__ = ["WeightSource", "check_weights", "open_weights"]

_LISTED = 20  # faults spelt out in one message
_BLOCK = 4 << 20  # values looked at together
_SEED_DIGITS = 20
# Fields in which a preset and a checkpoint of the same model may differ.
_FREE = {"max_ctx", "pad_id", "bos_id", "eos_ids"}


def open_weights(spec: str, config: ModelConfig | None = None) -> WeightSource:
    """Open weights by what `--weights` says.

    Args:
        spec: a directory, a GGUF file (of several parts the first), a hub id `org/name`, `random`
            or `random:SEED`.
        config: needed by `random`; a checkpoint brings its own and must describe the same model.

    Raises:
        WeightsError: nothing there, damaged, or a hub that cannot be reached.
        ConfigError: a model that is unknown, unsupported or not the one `config` describes.
    """
    if spec == "random" or spec.startswith("random:"):
        return _random(spec, config)
    path = Path(os.path.expanduser(spec))
    if os.path.isdir(path):
        return _same_model(_directory(path), config)
    if os.path.isfile(path):
        return _same_model(_file(path), config)
    if is_hub_id(spec):
        found = download(spec)
        return _same_model(_directory(found) if found.is_dir() else _file(found), config)
    raise WeightsError(
        f"{spec!r} does not exist; give a directory with config.json and safetensors, "
        "a .gguf file, a hub id like google/gemma-4-E2B-it, or `random`."
    )


def known_before(path: Path) -> bool:
    """Whether the readers here know the model at `path`, or can say what is wrong with it.

    Others are read by `models.checkpoint`.
    """
    from edge_kv.weights.gguf_file import is_gguf, open_gguf
    from edge_kv.weights.gguf_model import ARCHITECTURES
    from edge_kv.weights.hf_config import MODEL_TYPES

    if path.is_dir():
        try:
            kind = json.loads((path / "config.json").read_bytes()).get("model_type")
        except (OSError, ValueError, RecursionError, AttributeError):
            return True
        return kind in MODEL_TYPES
    if not is_gguf(path):
        return True
    return open_gguf(path).metadata.get("general.architecture") in ARCHITECTURES


def check_weights(source: WeightSource, *, values: bool = False) -> None:
    """Compare a checkpoint with the model's parameter table, tensor by tensor.

    Args:
        values: also read every value and look for NaN and infinity (`read` does so anyway).

    Raises:
        WeightsError: one error that lists every missing, surplus, wrongly shaped, unreadable and
            (with `values`) not finite tensor.
    """
    shapes, unreadable = source.shapes(), source.unreadable()
    faults: list[str] = []
    for spec in tensor_table(source.config):
        own = source.stored_name(spec.name)
        if spec.name not in shapes:
            faults.append(f"{own} is missing")
        elif shapes[spec.name] != spec.shape:
            faults.append(f"{own} has shape {shapes[spec.name]}, expected {spec.shape}")
        elif spec.name in unreadable:
            faults.append(f"{own} is {unreadable[spec.name]}")
        elif values and (where := _not_finite(source, spec)) is not None:
            faults.append(f"{own} is not finite at {list(where)}")
    faults += [f"{name} is not part of the model" for name in source.surplus()]
    faults += source.differing()
    if not faults:
        return
    more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    raise WeightsError(
        f"{source.label} does not fit its config, {len(faults)} "
        f"tensor{'s are' if len(faults) > 1 else ' is'} wrong: {'; '.join(faults[:_LISTED])}{more}."
    )


def _not_finite(source: WeightSource, spec: TensorSpec) -> tuple[int, ...] | None:
    step = max(1, _BLOCK * spec.shape[0] // spec.elements)
    for start in range(0, spec.shape[0], step):
        block = source.load(spec.name, start, min(spec.shape[0], start + step))
        if (where := first_not_finite(block, start)) is not None:
            return where
    return None


def _directory(path: Path) -> WeightSource:
    """A Hugging Face directory, or the one GGUF model in a directory without safetensors."""
    from edge_kv.weights.gguf_file import only_model
    from edge_kv.weights.hf import HFDirectory

    found = only_model(path)
    return HFDirectory(path) if found is None else _file(found)


def _file(path: Path) -> WeightSource:
    from edge_kv.weights.gguf_file import is_gguf
    from edge_kv.weights.gguf_model import GGUFModel

    if not is_gguf(path):
        raise WeightsError(
            f"{path} is a file but not a .gguf; give a directory with config.json and "
            "safetensors, a .gguf file, a hub id or `random`."
        )
    return GGUFModel(path)


def _random(spec: str, config: ModelConfig | None) -> WeightSource:
    from edge_kv.weights.random_weights import RandomWeights

    if config is None:
        raise WeightsError("`random` weights have no config of their own; name a model (--model).")
    seed = spec.removeprefix("random").removeprefix(":") or "0"
    if not (seed.isascii() and seed.isdecimal() and len(seed) < _SEED_DIGITS):
        raise WeightsError(f"{spec!r} has the seed {seed!r}, expected a whole number: random:7.")
    return RandomWeights(config, int(seed))


def _same_model(source: WeightSource, config: ModelConfig | None) -> WeightSource:
    if config is None:
        return source
    differ = [
        f"{f.name} is {getattr(source.config, f.name)}, expected {getattr(config, f.name)}"
        for f in dataclasses.fields(ModelConfig)
        if f.name not in _FREE and getattr(source.config, f.name) != getattr(config, f.name)
    ]
    if differ:
        raise ConfigError(
            f"{source.label} is not the model that was named: {'; '.join(differ)}; "
            "leave the name out to use the checkpoint's own config."
        )
    return source
