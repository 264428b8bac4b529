"""What file formats of checkpoints have in common: a stored tensor, recommended sampling."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_kv.formats import Quantised

Array = NDArray[np.float32]
_SHOWN = 40  # characters of a setting that a message shows
COMPARED = 4 << 20  # values of two tensors compared together

# Names under which Gemma tokenizers know what ends a turn: the last is where a tool answers.
TURN_ENDS = ("<end_of_turn>", "<turn|>", "<|tool_response>")


@dataclass(frozen=True)
class Generation:
    """How the makers of a checkpoint recommend to sample from it; None where they say nothing.

    `unused` are settings that would change the text and that no sampler here computes, as
    "name value".
    """

    temperature: float | None = None  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    suppress_tokens: tuple[int, ...] = ()  # ids that are never to be chosen
    unused: tuple[str, ...] = ()


class Text(Protocol):
    """What a checkpoint says beside its weights."""

    def tokenizer_json(self) -> str | None:
        """Content of a Hugging Face `tokenizer.json`, if the checkpoint has a tokenizer."""

    def named(self, role: str) -> str | None:
        """The token that templates are told as `role`, "bos_token" or "eos_token"; empty: there is
        none, None: it is not said.

        Raises:
            ConfigError: it is no text.
        """

    def chat_template(self) -> str | None:
        """The Jinja chat template, if the checkpoint has one."""

    def stop_ids(self) -> list[int]:
        """Turn-end ids beside the config's end tokens."""

    def generation(self) -> Generation:
        """The recommended sampling.

        Raises:
            ConfigError: a value out of range.
        """


TOOL_USE = "additional_chat_templates/tool_use.jinja"  # of a Hugging Face checkpoint


def one_template(default: str, tool_use: str | None) -> str:
    """The chat template of a checkpoint that has another one for when tools are offered.

    As in transformers and llama.cpp, that one is taken then; each is rendered as it would be alone.
    """
    if tool_use is None:
        return default
    parts = (t.removesuffix("\n") for t in (tool_use, default))  # as Jinja does at a template's end
    # A newline behind a tag is not of the text: what follows begins a line, as a template does.
    return "{%+ if tools %}\n" + "{%+ else %}\n".join(parts) + "{%+ endif %}"


@dataclass(frozen=True)
class Stored:
    """One tensor as a file holds it: shape, outermost axis first, and rows start … stop-1 as f32.

    `fault` says why it cannot be read (a storage type we do not decode); "" when it can. `dtype` is
    the file's own word for its storage. Of integers, `format` names the weight format that keeps
    them best ("" of floats), and `integers` yields the rows (of a stack: of its matrices, one
    below the other) in that format, if that loses nothing (`exact`) or only digits of scales that
    are no halves. A linear whose activations are rounded
    to fixed steps has `steps` of (input, output), 0 where it does not round. `raw` yields rows of
    whole numbers in the type of the file.
    """

    shape: tuple[int, ...]
    rows: Callable[[int, int], Array]
    fault: str = ""
    dtype: str = ""
    format: str = ""
    integers: Callable[[int, int], Quantised] | None = None
    exact: bool = True
    steps: tuple[float, float] = (0.0, 0.0)
    raw: Callable[[int, int], Any] | None = None


def said_otherwise(values: Mapping[str, Any], nothing: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings named in `nothing` that `values` gives a meaning, as "name value".

    Args:
        nothing: by name, the value that does nothing, beside null, false and what is empty.
    """
    found = []
    for name, idle in nothing.items():
        value = values.get(name)
        if value is None or value is False or value in ([], {}) or value == idle:
            continue
        text = json.dumps(value)
        found.append(f"{name} {text if len(text) <= _SHOWN else text[: _SHOWN - 1] + '…'}")
    return tuple(found)


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
