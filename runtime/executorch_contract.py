"""What a `.pte` takes and gives, against what the manifest says of it.

Both engines describe the methods they have loaded in lines, method, kind, type and sizes, of which
a size that varies is the largest: "prefill input int64 128".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from edge_kv.artifact import Artifact
from edge_kv.errors import ArtifactError

METHODS = ("prefill", "decode")
STATE = "state"
_STORAGE = {"f32": "float", "f16": "float16", "int8": "int8"}


def state_name(buffer: str) -> str:
    """What a state buffer is called in a program."""
    return f"state.{buffer.replace('.', '_')}"


def check_contract(artifact: Artifact, path: Path, lines: Iterable[str]) -> None:
    """Compare the lines of a loaded program with the manifest of `artifact`.

    Its state is compared where the lines speak of it.

    Raises:
        ArtifactError: they differ in any input, output or state buffer.
    """
    real = list(lines)
    said = list(_expected(artifact))
    held = {tuple(x.split()[1:]) for x in real if x.split()[1] == STATE}
    planned = set(_state(artifact))
    if [x for x in real if x.split()[1] != STATE] != said or (held and held != planned):
        odd = sorted({*said} ^ {x for x in real if x.split()[1] != STATE}) or sorted(
            " ".join(x) for x in held ^ planned
        )
        raise ArtifactError(
            f"{path} and the manifest disagree about {odd[0]!r}; copy or export the artifact again."
        )


def _expected(artifact: Artifact) -> Iterator[str]:
    backend = artifact.backend("executorch")
    for name in METHODS:
        program = backend.programs[name]
        for what, tensors in (("input", program.inputs), ("output", program.outputs)):
            for t in tensors:
                sizes = [artifact.plan.chunk if d == "chunk" else d for d in t.shape]
                yield " ".join([name, what, t.dtype, *map(str, sizes)])


def _state(artifact: Artifact) -> Iterator[tuple[str, ...]]:
    for b in artifact.plan.buffers:
        yield (STATE, state_name(b.name), _STORAGE[b.dtype], *map(str, b.shape))
