"""Where weights come from: a directory, a GGUF file, a hub id, or seeded random numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from edge_kv import models
from edge_kv.errors import ConfigError, WeightsError
from edge_kv.formats import Format, Quantised
from edge_kv.models.checkpoint import open_checkpoint
from edge_kv.models.model import Model, Row
from edge_kv.models.random_source import RandomSource
from edge_kv.weights.hub import download, is_hub_id
from edge_kv.weights.source import Array, Text

_RANDOM, _SEED_DIGITS = "random", 20
# Fields in which a named model and a checkpoint of it may differ.
_FREE = {"max_ctx", "pad_id", "bos_id", "eos_ids", "tied"}


class Source(Protocol):
    """A model's weights by name, and what its checkpoint says of text and sampling."""

    config: Model
    label: str  # where the weights came from, for people
    text: Text | None
    files: list[Path]  # what they were read from

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start … stop-1 (axis 0) of the weight `name`, as f32.

        Raises:
            WeightsError: no such weight or rows, another shape, or a value that is not finite.
        """

    def formats(self) -> Mapping[str, str]:
        """The formats that keep its matrices best (`Checkpoint.formats`); none of one of floats."""

    def is_exact(self, name: str) -> bool:
        """Whether that format loses nothing of the weight `name`."""

    def steps(self) -> Mapping[str, tuple[float, float]]:
        """Linears whose activations are rounded to fixed steps (`Checkpoint.steps`)."""

    def check(self) -> None:
        """Compare what is there with the model's weight rows.

        Raises:
            WeightsError: one error that lists every fault.
        """


def open_weights(
    spec: str, config: Model | None = None, formats: Mapping[str, str] | None = None
) -> Source:
    """Open weights by what `--weights` says.

    Args:
        spec: a directory, a GGUF file (of several parts the first), a hub id `org/name`, `random`
            or `random:SEED`.
        config: needed by `random`; a checkpoint brings its own and must describe the same model.
        formats: weight formats of kinds of tensors, in which random weights are drawn.

    Raises:
        WeightsError: nothing there, damaged, or a hub that cannot be reached.
        ConfigError: a model that is unknown, unsupported or not the one `config` describes.
    """
    if is_random(spec):
        return _random(spec, config, formats or {})
    path = Path(os.path.expanduser(spec))
    if path.exists():
        return _same_model(open_checkpoint(path), config)
    if is_hub_id(spec):
        return _same_model(open_checkpoint(download(spec), f"hub {spec}"), config)
    raise not_there(spec)


def is_random(spec: str) -> bool:
    """Whether `--weights` asks for seeded random numbers."""
    return spec == _RANDOM or spec.startswith(f"{_RANDOM}:")


def not_there(spec: str) -> WeightsError:
    """What to say of weights that are neither a path, nor on the hub, nor random."""
    page = re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", spec)
    if page:
        return WeightsError(f"{spec!r} is a page of the hub; give its id: --weights {page[1]}")
    return WeightsError(
        f"{spec!r} does not exist; give a directory with config.json and safetensors, "
        "a .gguf file, a hub id like google/gemma-4-E2B-it, or `random`."
    )


def open_model(row: Row | None, weights: str | None, formats: Mapping[str, str]) -> Source:
    """The weights of a named model, of a checkpoint, or of a checkpoint that must be that model.

    Without `weights` they are those that ship with the package, or the official checkpoint.

    Raises:
        ConfigError, WeightsError: see `open_weights`.
    """
    if row is None and weights is None:
        raise ConfigError("Name a model (--model e2b) or its weights (--weights DIR).")
    official = row.official if row else ""
    return open_weights(weights or official, row.config if row else None, formats)


def open_drafter(spec: str, target: Model, formats: Mapping[str, str]) -> tuple[Model, Source]:
    """What drafts for `target`, by what `--assistant` says: its config, bound to it, and weights.

    Args:
        spec: a directory, a hub id, or `random[:SEED]` for the shape that was published.

    Raises:
        WeightsError: nothing there, damaged, or a hub that cannot be reached.
        ConfigError: it drafts for no model, or for another.
    """
    row = models.official_drafter(target) if is_random(spec) else None
    source = open_weights(spec, row.config if row else None, formats)
    config = models.attach(source.config, target)
    models.module_of(config).check_values(config, source.read, source.label)
    return config, source


class Paired:
    """The weights of a target and of its drafter, which have no name in common, as one source."""

    def __init__(self, target: Source, drafter: Source):
        self.config, self.text = target.config, target.text
        self.label = f"{target.label} with {drafter.label}"
        self.files = [*target.files, *drafter.files]
        self._both = target, drafter
        self._of: dict[str, Any] = {
            row.name: source for source in self._both for row in models.weights(source.config)
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows of a weight: see `Source`."""
        rows: Array = self._of[name].read(name, start, stop)
        return rows

    def formats(self) -> dict[str, str]:
        return {name: f for source in self._both for name, f in source.formats().items()}

    def steps(self) -> dict[str, tuple[float, float]]:
        return {name: s for source in self._both for name, s in source.steps().items()}

    def is_exact(self, name: str) -> bool:
        return bool(self._of[name].is_exact(name))

    def packed(self, name: str, fmt: Format, start: int, stop: int) -> Any:
        """Rows of a weight as `fmt` stores them: see `Checkpoint.packed`."""
        return self._of[name].packed(name, fmt, start, stop)

    def integers(self, name: str, fmt: Format, start: int, stop: int) -> Quantised | None:
        """Rows of a weight in integers: see `Checkpoint.integers`."""
        found: Quantised | None = self._of[name].integers(name, fmt, start, stop)
        return found

    def check(self) -> None:
        for source in self._both:
            source.check()


def _random(spec: str, config: Model | None, formats: Mapping[str, str]) -> RandomSource:
    return RandomSource(drawn_config(config), random_seed(spec), formats)


def drawn_config(config: Model | None) -> Model:
    """The config that random weights are drawn for, which a named model has to give.

    Raises:
        WeightsError: no model was named.
    """
    if config is None:
        raise WeightsError("`random` weights have no config of their own; name a model (--model).")
    return config


def random_seed(spec: str) -> int:
    """The seed of `random` or `random:SEED`.

    Raises:
        WeightsError: it is no whole number.
    """
    seed = spec.removeprefix(_RANDOM).removeprefix(":") or "0"
    if not (seed.isascii() and seed.isdecimal() and len(seed) < _SEED_DIGITS):
        raise WeightsError(f"{spec!r} has the seed {seed!r}, expected a whole number: random:7.")
    return int(seed)


def _same_model(source: Source, config: Model | None) -> Source:
    if config is not None:
        check_same(source.label, source.config, config)
    return source


def check_same(label: str, config: Model, named: Model) -> None:
    """Refuse weights that are not of the model they are said to be of.

    Raises:
        ConfigError: naming every field that differs.
    """
    if type(config) is not type(named):
        differ = [f"it is a {models.name_of(config)} model, expected {models.name_of(named)}"]
    else:
        differ = [
            f"{f.name} is {getattr(config, f.name)}, expected {getattr(named, f.name)}"
            for f in fields(named)
            if f.compare and f.name not in _FREE
            if getattr(config, f.name) != getattr(named, f.name)
        ]
    if differ:
        raise ConfigError(
            f"{label} is not the model that was named: {'; '.join(differ)}; "
            "leave the name out to use the checkpoint's own config."
        )
