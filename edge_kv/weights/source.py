"""What every checkpoint reader offers, and the half that all file formats share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_kv.config import ModelConfig
from edge_kv.errors import WeightsError
from edge_kv.tensors import TensorSpec, tensor_table

Array = NDArray[np.float32]
COMPARED = 4 << 20  # values of two tensors compared together

# Names under which Gemma tokenizers know what ends a turn: the last is where a tool answers.
TURN_ENDS = ("<end_of_turn>", "<turn|>", "<|tool_response>")


@dataclass(frozen=True)
class Generation:
    """How the makers of a checkpoint recommend to sample from it; None where they say nothing."""

    temperature: float | None = None  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    suppress_tokens: tuple[int, ...] = ()  # ids that are never to be chosen


class WeightSource(Protocol):
    """A checkpoint read tensor by tensor, row block by row block, under canonical names."""

    config: ModelConfig
    label: str  # where the weights came from, for people

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start … stop-1 (axis 0) of the tensor `name` of `tensors.tensor_table`, as f32.

        Raises:
            WeightsError: no such tensor or rows, another shape, or a value that is not finite.
        """
        ...

    def load(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """`read` without the check for NaN and infinity."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and stored shape of every tensor that was found."""
        ...

    def unreadable(self) -> dict[str, str]:
        """Canonical name and reason for every tensor found in a storage that cannot be read."""
        ...

    def surplus(self) -> list[str]:
        """Stored tensors that no part of the model uses."""
        ...

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls the tensor `name`, for messages."""
        ...

    def tokenizer_json(self) -> str | None:
        """Content of a Hugging Face `tokenizer.json`, if the checkpoint has a tokenizer."""
        ...

    def chat_template(self) -> str | None:
        """The Jinja chat template, if the checkpoint has one."""
        ...

    def stop_ids(self) -> list[int]:
        """Turn-end ids beside `config.eos_ids`."""
        ...

    def generation(self) -> Generation:
        """The recommended sampling.

        Raises:
            ConfigError: a value out of range.
        """
        ...

    def files(self) -> list[Path]:
        """Every file that an export reads: its content decides what comes out."""
        ...

    def differing(self) -> list[str]:
        """A sentence for every stored tensor that would have to repeat another and does not.

        Reads both tensors whole.
        """
        ...


class Readable:
    """`read` in terms of `load`: shape and range checked before, finiteness after."""

    config: ModelConfig
    label: str

    def __init__(self, config: ModelConfig, label: str):
        self.config = config
        self.label = label
        self._table = {spec.name: spec for spec in tensor_table(config)}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        block = self.load(name, start, stop)
        if (where := first_not_finite(block, start)) is not None:
            raise WeightsError(
                f"{self.stored_name(name)} in {self.label} is not finite at {list(where)}; "
                "the checkpoint is damaged, download or convert it again."
            )
        return block

    def load(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        raise NotImplementedError

    def stored_name(self, name: str) -> str:
        return name

    def unreadable(self) -> dict[str, str]:
        return {}

    def tokenizer_json(self) -> str | None:
        return None

    def chat_template(self) -> str | None:
        return None

    def stop_ids(self) -> list[int]:
        return []

    def generation(self) -> Generation:
        return Generation()

    def files(self) -> list[Path]:
        return []

    def differing(self) -> list[str]:
        return []

    def _request(self, name: str, start: int, stop: int | None) -> tuple[TensorSpec, int]:
        """The tensor's spec and the resolved `stop`; raises WeightsError for what cannot be."""
        spec = self._table.get(name)
        if spec is None:
            raise WeightsError(
                f"{name!r} is not a tensor of this model; use a name of tensors.tensor_table."
            )
        stop = spec.shape[0] if stop is None else stop
        if not 0 <= start <= stop <= spec.shape[0]:
            raise WeightsError(
                f"{name} has rows 0 to {spec.shape[0]}, asked for {start} to {stop}."
            )
        return spec, stop


@dataclass(frozen=True)
class Stored:
    """One tensor as a file holds it: shape, outermost axis first, and rows start … stop-1 as f32.

    `fault` says why it cannot be read (a storage type we do not decode); "" when it can. `dtype` is
    the file's own word for its storage.
    """

    shape: tuple[int, ...]
    rows: Callable[[int, int], Array]
    fault: str = ""
    dtype: str = ""


def filled_up(table: Stored, rows: int, spare: int) -> Stored:
    """`table` with `rows` rows: those it lacks are its row `spare`, those too many are left out."""
    held = table.shape[0]

    def read(start: int, stop: int) -> Array:
        own = table.rows(min(start, held), min(stop, held))
        if stop <= held:
            return own
        more = stop - max(start, held)
        return np.concatenate([own, np.repeat(table.rows(spare, spare + 1), more, axis=0)])

    return Stored((rows, *table.shape[1:]), read, table.fault)


class Checkpoint(Readable):
    """A file format's tensors under canonical names.

    Args:
        stored: every tensor of the checkpoint by its own name.
        names: canonical name -> own names; several are parts joined along axis 1.
        surplus: own names that nothing uses.
        heads: own names of LM heads, which have to repeat the token table: the models are tied.
        norm_offset: added to every norm weight (Gemma 3 stores w and multiplies by 1 + w).
    """

    def __init__(
        self,
        config: ModelConfig,
        label: str,
        *,
        stored: Mapping[str, Stored],
        names: Mapping[str, tuple[str, ...]],
        surplus: list[str],
        heads: list[str],
        norm_offset: float = 0.0,
    ):
        super().__init__(config, label)
        self._heads = heads
        self._stored = stored
        self._names = names
        self._surplus = surplus
        self._norm_offset = norm_offset

    def load(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        spec, stop = self._request(name, start, stop)
        shape = self._shape(name)
        if shape is None:
            raise WeightsError(f"{self.label} has no tensor {self.stored_name(name)!r}.")
        if shape != spec.shape:
            raise WeightsError(
                f"{self.stored_name(name)} in {self.label} has shape {shape}, "
                f"the model needs {spec.shape}."
            )
        parts = [self._stored[own] for own in self._names[name]]
        for part in parts:
            if part.fault:
                raise WeightsError(f"{self.stored_name(name)} in {self.label} is {part.fault}.")
        blocks = [part.rows(start, stop) for part in parts]
        block = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
        if self._norm_offset and name.endswith("norm.weight"):
            block += np.float32(self._norm_offset)
        return block

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = {name: self._shape(name) for name in self._table}
        return {name: shape for name, shape in found.items() if shape is not None}

    def unreadable(self) -> dict[str, str]:
        faults: dict[str, str] = {}
        for name in self._table:
            for own in self._names[name]:
                if own in self._stored and self._stored[own].fault:
                    faults[name] = self._stored[own].fault
        return faults

    def surplus(self) -> list[str]:
        return self._surplus

    def differing(self) -> list[str]:
        table = " + ".join(self._names["embed.weight"])
        return [
            f"{own} is an LM head of its own (it differs from {table}), and edge-kv computes only "
            "heads that are tied to the token table"
            for own in self._heads
            if not self._repeats(own, table)
        ]

    def _repeats(self, own: str, other: str) -> bool:
        """Whether two stored tensors hold the same values."""
        a, b = self._stored[own], self._stored.get(other)
        if b is None or a.shape != b.shape or a.fault or b.fault:
            return False
        n, step = a.shape[0], max(1, COMPARED // max(1, prod(a.shape[1:])))
        ranges = [(i, min(i + step, n)) for i in range(0, n, step)]
        return all(np.array_equal(a.rows(*r), b.rows(*r)) for r in ranges)

    def stored_name(self, name: str) -> str:
        return " + ".join(self._names.get(name, (name,)))

    def _shape(self, name: str) -> tuple[int, ...] | None:
        own = self._names[name]
        if any(n not in self._stored for n in own):
            return None
        first, *rest = (self._stored[n].shape for n in own)
        if not rest:
            return first
        return (first[0], first[1] + sum(s[1] for s in rest), *first[2:])


def first_not_finite(block: Array, start: int = 0) -> tuple[int, ...] | None:
    """Index of the first NaN or infinity in rows that begin at `start`, or None.

    min and max both carry a NaN through, so the usual case needs no mask as large as the block.
    """
    if block.size == 0 or (np.isfinite(block.min()) and np.isfinite(block.max())):
        return None
    index = np.unravel_index(int(np.argmin(np.isfinite(block))), block.shape)
    return (int(index[0]) + start, *(int(i) for i in index[1:]))


def turn_end_ids(tokens: Mapping[str, int], known: tuple[int, ...]) -> list[int]:
    """Ids of the turn-end tokens in a token -> id map that are not `known` yet."""
    return [tokens[t] for t in TURN_ENDS if t in tokens and tokens[t] not in known]
