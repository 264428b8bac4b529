"""What `plan` and `export` are asked for: the model that is meant, and what can be known early.

Everything here is found before a heavy import and before a large download: a wrong name, a context
the model does not have, a disk without room, a package that is missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from edge_kv import models
from edge_kv.amounts import size
from edge_kv.errors import ConfigError, ExportError, did_you_mean, one_line
from edge_kv.guidance import check_model, model_meant
from edge_kv.models.checkpoint import Checkpoint, open_described
from edge_kv.models.model import Model, Row
from edge_kv.models.sources import (
    check_same,
    drawn_config,
    is_random,
    not_there,
    random_seed,
)
from edge_kv.progress import Progress
from edge_kv.weights.hub import download, is_hub_id

BACKENDS = {"onnx": ("onnx",), "executorch": ("executorch",), "both": ("onnx", "executorch")}
_PACKAGES = {
    "torch": "export", "onnx": "export", "onnxscript": "export", "safetensors": "export",
}  # fmt: skip
_OF_BACKEND = {"executorch": {"executorch": "executorch", "torchao": "executorch"}}
_SPARE = 64 << 20  # bytes of programs, tokenizer and reference vectors beside the weights


@dataclass(frozen=True)
class Subject:
    """The model that `--model` and `--weights` name."""

    name: str  # for people, and for the directory that export makes
    config: Model
    weights: str  # what export reads: a path, a hub id, `random` or `random:SEED`
    model: str | None  # the row of `--model`, where one was named
    revision: str | None
    checkpoint: Checkpoint | None = None  # where all of it is here

    @property
    def on_hub(self) -> bool:
        return is_hub_id(self.weights)

    def fetch(self, progress: Progress | None = None) -> str:
        """`weights`, brought here if they are on the hub.

        Raises:
            WeightsError: see `weights.hub.download`.
        """
        if not self.on_hub:
            return self.weights
        return str(download(self.weights, self.revision, progress=progress))

    def formats(self) -> dict[str, str]:
        """The formats of a quantised checkpoint's matrices; none of one that is not here whole."""
        return self.checkpoint.formats() if self.checkpoint else {}


def find_subject(model: str | None, weights: str | None, revision: str | None = None) -> Subject:
    """The model that is meant; of a hub repository only its config is fetched.

    Raises:
        ConfigError: no such model, none named, or weights of another model than the one named.
        WeightsError: nothing there, damaged, or the hub cannot provide it.
    """
    check_model(model, weights)
    row = _row(model) if model else None
    if weights is None:
        if row is None or model is None:
            raise ConfigError("Name a model: --model e2b (a preset) or --weights DIR.")
        return Subject(model, row.config, row.official, model, revision)
    if revision is not None and not is_hub_id(weights):
        raise ConfigError(f"--revision is of a hub repository, and {weights!r} is none.")
    name = model or (Path(weights).name.removesuffix(".gguf") or weights)
    if is_random(weights):
        config = drawn_config(row.config if row else None)
        random_seed(weights)
        return Subject(name, config, weights, model, None)
    path = Path(weights).expanduser()
    if is_hub_id(weights):
        path = download(weights, revision, config_only=True)
    config, checkpoint = _described(path, weights)
    if row is not None:
        check_same(weights, config, row.config)
    return Subject(name, config, weights, model, revision, checkpoint)


def find_assistant(spec: str, target: Model) -> Model:
    """The config of what `--assistant` names, bound to its target; of a hub repository only its
    config is fetched.

    Raises:
        ConfigError: it drafts for no model, or for another.
        WeightsError: nothing there, damaged, or the hub cannot provide it.
    """
    if is_random(spec):
        random_seed(spec)
        return models.official_drafter(target).config
    path = Path(spec).expanduser()
    if is_hub_id(spec) and not path.exists():
        path = download(spec, config_only=True)
    return models.attach(_described(path, spec)[0], target)


def fetch_assistant(spec: str, progress: Progress | None = None) -> str:
    """What `--assistant` names, brought here if it is on the hub.

    Raises:
        WeightsError: see `weights.hub.download`.
    """
    there = is_random(spec) or Path(spec).expanduser().exists()
    return spec if there or not is_hub_id(spec) else str(download(spec, progress=progress))


def _row(model: str) -> Row:
    """The official model called `model`; other spellings of one are answered with its name."""
    if model not in models.ROWS:
        meant = model_meant(model, {name: row.hub_id for name, row in models.ROWS.items()})
        if meant:
            raise ConfigError(f"Unknown model {model!r}. Did you mean {meant!r}?")
    return models.get_row(model)


def _described(path: Path, spec: str) -> tuple[Model, Checkpoint | None]:
    """See `open_described`; `spec` is what was given for the path."""
    if not path.exists():
        raise not_there(spec)
    return open_described(path)


def check_backend(backend: str) -> tuple[str, ...]:
    """The backends that `--backend` means.

    Raises:
        ConfigError: none of the known ones.
    """
    if backend not in BACKENDS:
        hint = " Did you mean 'both'?" if "," in backend else did_you_mean(backend, BACKENDS)
        raise ConfigError(f"Unknown backend {backend!r}.{hint}")
    return BACKENDS[backend]


def check_packages(backends: Iterable[str], weights: str) -> None:
    """Refuse an export whose libraries are not installed; none of them is imported.

    Raises:
        ConfigError: naming the package and the extra that brings it.
    """
    needed = dict(_PACKAGES)
    if weights.lower().endswith(".gguf"):
        needed["gguf"] = "export"
    for backend in backends:
        needed |= _OF_BACKEND.get(backend, {})
    for package, extra in needed.items():
        if find_spec(package) is None:
            raise ConfigError(
                f"Exporting needs {package}, which is not installed; in the checkout, run: "
                f"pip install '.[{extra}]'"
                + (" && pip install --no-deps executorch==1.5.1" if extra == "executorch" else "")
            )


def check_new(out: Path) -> None:
    """Refuse a target that exists; a link to nothing does too, since a rename does not replace it.

    Raises:
        ExportError: it exists, or its name, which the manifest holds, is no text.
    """
    try:
        out.name.encode()
    except UnicodeError:
        raise ExportError(f"{one_line(str(out))} is no UTF-8 text; choose another --out.") from None
    if os.path.lexists(out):
        raise ExportError(f"{out} already exists; remove it or choose another --out.")


def check_output(out: Path, needed: int, unfinished: int = 0) -> None:
    """Refuse a target that cannot be written or has no room for `needed` bytes.

    Args:
        unfinished: bytes that an interrupted export of the same request left already.

    Raises:
        ExportError: it exists, its parent cannot be written, or the disk is too small.
    """
    check_new(out)
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ExportError(f"Cannot write in {parent}; choose another --out.")
    free, needed = shutil.disk_usage(parent).free, needed + _SPARE - unfinished
    if needed > free:
        raise ExportError(
            f"The artifact takes {size(needed)} and the disk of {parent} has {size(free)} left; "
            "free some space, or choose an --out on another disk."
        )
