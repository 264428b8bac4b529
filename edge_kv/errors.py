"""Every error edge-kv raises on purpose.

EdgeKVError                what the CLI catches: one sentence, exit status 1
├── ConfigError            a model description that is unknown, inconsistent or unsupported
├── PlanError              a KV plan that could lose a key, or a request no plan can serve
├── WeightsError           a checkpoint that is missing, cut off, wrongly shaped or not finite
├── ExportError            a lowering that failed
│   └── ParityError        the exported programs do not compute what the model computes
├── ArtifactError          an artifact directory that is missing, changed or of another version
├── SnapshotError          a KV snapshot that belongs to another model or plan, or is cut off
├── Cancelled              Ctrl-C in work that can be taken up again
├── DeployError            a device that cannot be reached, filled, installed on or measured
└── RuntimeFault           the runtime cannot go on
    ├── PromptError        a prompt that is empty, too long or holds unknown token ids
    ├── ContextFullError   the next token does not fit the exported context
    ├── RewindError        the rings no longer hold the rows a rewind would need
    └── MemoryLimitError   the plan does not fit the memory there is

Messages are one sentence that names the value, what was expected and what to do.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable


class EdgeKVError(Exception):
    """Base of every deliberate error; its text is shown to the user as it is."""


class ConfigError(EdgeKVError):
    """A model description is unknown, inconsistent or unsupported."""


class PlanError(EdgeKVError):
    """A KV plan could lose a key, or no plan can serve the request."""


class WeightsError(EdgeKVError):
    """A checkpoint is missing, cut off, wrongly shaped or not finite."""


class ExportError(EdgeKVError):
    """A lowering failed; nothing is left behind."""


class ParityError(ExportError):
    """The exported programs do not compute what the model computes."""


class ArtifactError(EdgeKVError):
    """An artifact directory is missing, tampered with or of another version."""


class SnapshotError(EdgeKVError):
    """A KV snapshot belongs to another model or plan, or is cut off."""


class Cancelled(EdgeKVError):
    """The user ended work that the same command takes up again; the message says how."""


class DeployError(EdgeKVError):
    """A device cannot be reached, filled, installed on or measured."""


class RuntimeFault(EdgeKVError):
    """The runtime cannot go on."""


class PromptError(RuntimeFault):
    """A prompt is empty, too long or holds token ids the model does not know."""


class ContextFullError(RuntimeFault):
    """The next token does not fit the exported context."""


class RewindError(RuntimeFault):
    """The rings no longer hold the rows that a rewind would need."""


class MemoryLimitError(RuntimeFault):
    """The plan does not fit the memory there is."""


_BITS = re.compile(r"[a-z]*?(4|8|16|32)(?!\d)")  # in q4_k_m, int8, fp16, bf16, float32
_STORAGES = {"4": ["int4"], "8": ["int8"], "16": ["f16", "none"], "32": ["f32", "none"]}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest known name, else the list of known names."""
    choices = sorted(known)
    bits = _BITS.match(name.lower())
    usual = [c for c in _STORAGES[bits[1]] if c in choices] if bits else []
    close = usual[:1] or difflib.get_close_matches(name.lower(), choices, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(choices)}."


def one_line(text: str) -> str:
    """`text` on one line and without what would steer a terminal: names, templates and devices
    that a message quotes are foreign."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_LONGEST_NAME = 200  # characters of a file name in a message


def unusable(error: OSError) -> str:
    """What to say of a file or a stream that the system refuses."""
    why, name = error.strerror or str(error), error.filename
    if name is None:
        return f"{why}."
    shown = os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else f"file {name}"
    return f"{shown[:_LONGEST_NAME]} cannot be used ({why}); look at the name and its permissions."
