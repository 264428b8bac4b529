"""The files of a Hugging Face directory: which of them are the model, and what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_kv.errors import WeightsError
from edge_kv.files import LONGEST_TEXT
from edge_kv.weights.safetensors_file import open_safetensors
from edge_kv.weights.source import Stored

# Where transformers looks for weights, in its order.
_SHARD_LIST = ".safetensors.index.json"
_LONGEST = 255  # characters of a file's name
_WHOLE, _INDEX = "model.safetensors", f"model{_SHARD_LIST}"


def read_text(path: Path) -> str | None:
    """The text of a file; None where there is no file."""
    if not path.is_file():
        return None
    try:
        if (size := path.stat().st_size) > LONGEST_TEXT:
            raise WeightsError(
                f"{path} has {size} bytes, at most {LONGEST_TEXT} are read; download it again."
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise WeightsError(f"{path} cannot be read as text ({e}); download it again.") from e


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file."""
    text = read_text(path)
    return None if text is None else parsed(text, path)


def parsed(text: str, path: Path) -> dict[str, Any]:
    """The object that `text`, of the file at `path`, is in JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise WeightsError(f"{path} is not valid JSON ({e}); download it again.") from e
    if not isinstance(value, dict):
        raise WeightsError(f"{path} is not a JSON object; download it again.")
    return value


def weight_files(root: Path, named: Any) -> list[Path]:
    """The files transformers would read, by its rule: the one that config.json names, else
    model.safetensors, else the shards of model.safetensors.index.json. Others are ignored.

    Args:
        named: `transformers_weights` of config.json.

    Raises:
        WeightsError: an adapter, a path outside the directory, or files that are missing.
    """
    if (root / "adapter_config.json").is_file():
        raise WeightsError(
            f"{root} holds an adapter (adapter_config.json), and transformers would load it on "
            "top of another model; merge it and give the merged directory."
        )
    if named is not None:
        known = isinstance(named, str) and named.endswith((".safetensors", _SHARD_LIST))
        if not known or Path(named).name != named:
            raise WeightsError(
                f"{root / 'config.json'}: transformers_weights is {named!r}, expected a "
                f".safetensors or {_SHARD_LIST} file of the directory."
            )
        file = root / named
    else:
        file = next((f for f in (root / _WHOLE, root / _INDEX) if f.is_file()), root / _WHOLE)
    if file.name.endswith(_SHARD_LIST):
        return _shards(root, file)
    if file.is_file():
        return [file]
    others = sorted(f.name for f in root.glob("*.safetensors"))
    if not others:
        raise WeightsError(
            f"{root} has no .safetensors file; edge-kv reads safetensors and GGUF, "
            "convert the checkpoint."
        )
    raise WeightsError(
        f"{root} has no {file.name} and no {_INDEX}, and which of its files are the model "
        f"({', '.join(others[:3])}{', …' if len(others) > 3 else ''}) is not said; "
        f"rename the right one to {_WHOLE}, or download the index."
    )


def _shards(root: Path, index: Path) -> list[Path]:
    """The files a shard index lists."""
    listed = (read_json(index) or {}).get("weight_map")
    if (
        not isinstance(listed, dict)
        or not listed
        or not all(isinstance(shard, str) for shard in listed.values())
    ):
        raise WeightsError(f"{index} has no weight_map; download it again.")
    shards = sorted(set(listed.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise WeightsError(f"{index} names {shard!r}, a path outside the directory; refused.")
        if not shard.isprintable() or len(shard) > _LONGEST:
            raise WeightsError(f"{index} names {shard[:80]!a}, no name of a file; refused.")
    missing = [shard for shard in shards if not (root / shard).is_file()]
    if missing:
        raise WeightsError(
            f"{root} lacks {len(missing)} of {len(shards)} shards "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); "
            "download them again."
        )
    return [root / shard for shard in shards]


def open_files(files: list[Path]) -> dict[str, Stored]:
    """Every tensor of every file."""
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
