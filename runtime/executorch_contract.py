"""What a `.pte` takes and gives, against what the manifest says of it.

Both engines describe the methods they have loaded in lines, method, kind, type and sizes, of which
a size that varies is the largest: "prefill input int64 128".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from edge_kv.artifact import Artifact
from edge_kv.errors import ArtifactError
from edge_kv.manifest import DRAFT
from edge_kv.plan import Table

METHODS = ("prefill", "decode")  # of every program; one with a drafter has DRAFT too
STATE = "state"
_STORAGE = {"f32": "float", "f16": "float16", "int8": "int8"}


def state_name(table: str) -> str:
    """What a table is called in a program."""
    return f"state.{table.replace('.', '_')}"


def tables(artifact: Artifact) -> list[Table]:
    """The tables that the programs of `artifact` hold."""
    return list(artifact.plan.tables)


def fed_layers(artifact: Artifact, method: str) -> int:
    """How many layers' per-layer rows a method takes; 0: none.

    Raises:
        ArtifactError: they are not those of the artifact's file of per-layer rows.
    """
    entry = artifact.manifest.ple
    program = artifact.backend("executorch").programs[method]
    shapes = [t.shape for t in program.inputs if t.name == "ple"]
    layers = shapes[0][1] if shapes and len(shapes[0]) == 3 else 0
    width = shapes[0][2] if layers else 0
    if (
        not isinstance(layers, int)
        or bool(shapes) != bool(entry)
        or (entry and (not 0 < layers <= entry.n_layers or width != entry.dim))
    ):
        raise ArtifactError(
            f"{artifact.root}: its {method} program takes other per-layer rows than its manifest "
            "has; it was edited; copy or export the artifact again."
        )
    return layers


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
    drafted = artifact.manifest.drafter is not None and DRAFT in backend.programs
    for name in (*METHODS, DRAFT) if drafted else METHODS:
        program = backend.programs[name]
        most = artifact.plan.drafts + 1 if name == "decode" else artifact.plan.chunk
        for what, tensors in (("input", program.inputs), ("output", program.outputs)):
            for t in tensors:
                sizes = [most if isinstance(d, str) else d for d in t.shape]
                yield " ".join([name, what, t.dtype, *map(str, sizes)])


def _state(artifact: Artifact) -> Iterator[tuple[str, ...]]:
    for t in tables(artifact):
        yield (STATE, state_name(t.name), _STORAGE[t.dtype], *map(str, t.shape))
