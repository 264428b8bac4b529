"""Calibration between a checkpoint and the weight file: matrices are read, rounded and stored.

A matrix that the file keeps in few bits is rounded by `calibrate` for its inputs; everything else
was written before. Finished matrices are noted in the file's journal, so that a killed export runs
the text again, over what is stored, and goes on with the first matrix that is not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_kv import models
from edge_kv.errors import ConfigError, WeightsError
from edge_kv.export.calibrate import WINDOW, calibrate, sequences, shipped_text
from edge_kv.export.rounding import Factor
from edge_kv.export.weight_file import (
    Journal,
    StoredWeights,
    WeightLayout,
    put_rows,
    row_step,
    sized_file,
)
from edge_kv.formats import GROUP, dequantise, unpack
from edge_kv.models.model import Model
from edge_kv.progress import Progress

SHIPPED, NONE = "shipped", "none"
MOST_BITS = 4  # formats with more lose so little that calibration gains nothing
Read = Callable[[str, int, int], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Calibration:
    """The text matrices are rounded for: where it is from, its digest, its sequences of ids."""

    name: str
    digest: str
    texts: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        asked: str,
        encode: Callable[[str], list[int]] | None,
        start: Sequence[int],
        longest: int,
    ) -> Calibration | None:
        """What `--calibration` asks for: the shipped text, none, or a file.

        Args:
            encode: text -> ids without start token; None for a model without a tokenizer, which
                cannot be calibrated by a text.
            longest: the model's context.

        Raises:
            WeightsError: a file that cannot be read as text.
            ConfigError: a file for a model without a tokenizer.
        """
        if asked == NONE or (asked == SHIPPED and encode is None):
            return None
        if encode is None:
            raise ConfigError(
                f"A model without a tokenizer cannot read {asked}; use --calibration none."
            )
        text = shipped_text() if asked == SHIPPED else _read_text(Path(asked))
        texts = sequences(encode, text, start, min(WINDOW, longest))
        return cls(asked, sha256(text.encode()).hexdigest(), tuple(texts))

    @property
    def tokens(self) -> int:
        return sum(len(text) for text in self.texts)

    def as_dict(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"text": Path(self.name).name, "sha256": self.digest, "tokens": self.tokens}


def plain_encoder(tokenizer_json: str | None) -> Callable[[str], list[int]] | None:
    """Text -> ids without a start token, if there is a tokenizer."""
    if tokenizer_json is None:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise WeightsError(f"The calibration text {path} cannot be read ({why}).") from e


def calibrated(layout: WeightLayout) -> frozenset[str]:
    """The tensors of a layout whose rounding calibration improves."""
    return frozenset(
        t.spec.name
        for t in layout.tensors
        if t.format and t.format.bits <= MOST_BITS and layout.calibrates
    )


def calibrate_weights(
    config: Model,
    read: Read,
    layout: WeightLayout,
    path: Path,
    journal: Journal,
    calibration: Calibration,
    progress: Progress,
    *,
    names: Mapping[str, str] | None = None,
    token_rows: Callable[[Tensor], Tensor] | None = None,
    device: str = "cpu",
) -> None:
    """Round and store the `calibrated` tensors of the weight file at `path`, whose rest is written.

    Args:
        read: (tensor of the layout, start, stop) -> float rows of the checkpoint.
        names: the net's name of a weight -> its name in the layout, where they differ.
        token_rows: rows of the per-layer embedding, for models that have one.

    Raises:
        ConfigError: no such device.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"Torch finds no device {device!r} here; use --device cpu.")
    longest = max(len(text) for text in calibration.texts)
    rows = models.weights(config)
    with sized_file(path, layout.bytes) as fd:
        store = _FileStore(read, layout, StoredWeights(layout, path), fd, journal, names or {})
        wanted = sum(store.rounds(row.name) for row in rows)
        done = 0

        def reached(name: str) -> None:
            nonlocal done
            done += 1
            progress.advance(name, done, wanted)

        if wanted:
            calibrate(
                config,
                models.plan(config, ctx=longest, chunk=longest, kv="f32"),
                rows,
                store,
                calibration.texts,
                token_rows=token_rows,
                device=device,
                on_matrix=reached,
            )


class _FileStore:
    """`calibrate.Store` over a checkpoint and the weight file."""

    def __init__(
        self, read: Read, layout: WeightLayout, written: StoredWeights, fd: int, journal: Journal,
        names: Mapping[str, str],
    ):  # fmt: skip
        self._read, self._layout, self._written = read, layout, written
        self._fd, self._journal, self._names = fd, journal, names
        self._todo = {n for n in calibrated(layout) if not journal.has(n, "error")}
        self._sums: dict[str, tuple[float, float]] = {}  # squares of what is lost, and of all

    def rounds(self, name: str) -> bool:
        return self._names.get(name, name) in self._todo

    def source(self, name: str, start: int, stop: int) -> Tensor:
        return torch.from_numpy(self._read(self._names.get(name, name), start, stop))

    def stored(self, name: str, start: int, stop: int) -> Tensor:
        name = self._names.get(name, name)
        t = self._layout.by_name[name]
        if t.format is None:
            return self.source(name, start, stop)
        region = self._layout.region(t)
        if len(t.spec.shape) == 2:
            groups = self._written.read(region.name, start // GROUP, -(-stop // GROUP)).numpy()
            first = start // GROUP * GROUP
            q = unpack(t.format, groups, stop - first, t.spec.shape[1])
            return torch.from_numpy(dequantise(t.format, q))[start - first :]
        found = [
            dequantise(t.format, unpack(t.format, packed, *t.spec.shape[1:]))
            for packed in self._written.read(region.name, start, stop).numpy()
        ]
        return torch.from_numpy(np.stack(found))

    def round(self, name: str, start: int, stop: int, factors: list[Factor] | None) -> None:
        name = self._names.get(name, name)
        t = self._layout.by_name[name]
        if len(t.spec.shape) == 3:
            expert = start // t.spec.shape[1]
            self._round(name, self._read(name, expert, expert + 1)[0], expert, factors)
            return
        step = row_step(t.spec.shape[1:])
        for at in range(start, stop, step):
            end = min(at + step, stop)
            self._round(name, self._read(name, at, end), at // GROUP, factors)

    def _round(
        self, name: str, values: np.ndarray[Any, Any], at: int, factors: list[Factor] | None
    ) -> None:
        t = self._layout.by_name[name]
        assert t.format
        rows = torch.from_numpy(values)
        if factors:
            rows = rows.to(factors[0].upper.device)
        q, lost = self._layout.quantise(rows, t.format, factors)
        so_far, size = self._sums.get(name, (0.0, 0.0))
        size += float(rows.square().sum(dtype=torch.float64))
        self._sums[name] = so_far + lost, size
        put_rows(self._fd, self._layout.region(t), at, t.format, q)

    def finish(self, name: str) -> None:
        name = self._names.get(name, name)
        os.fsync(self._fd)
        lost, size = self._sums.pop(name)
        self._journal.add(name, error=round((lost / size) ** 0.5, 7) if size else 0.0)
        self._todo.remove(name)
