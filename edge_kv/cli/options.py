"""Options and arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def flag(name: str, help: str, **more: Any) -> Any:
    """An option without a value: the help says no type, which would look like one."""
    return typer.Option(name, help=help, metavar="", **more)


def values(module: str, name: str, *more: str) -> Any:
    """What a shell completes an option with: the keys of `name` in `module`, imported only then."""

    def values() -> list[str]:
        from importlib import import_module

        return [*getattr(import_module(module), name), *more]

    return values


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A preset: e2b, e4b, 12b, 26b-a4b, 31b, tiny, …",
        autocompletion=values("edge_kv.models", "ROWS"),
    ),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", help="HF directory, .gguf file, hub id, or random[:SEED]."),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Of a hub id: a branch, tag or commit.")
]
Assistant = Annotated[
    str | None,
    typer.Option("--assistant", help="What drafts beside it: HF directory, hub id or random."),
]
Ctx = Annotated[str, typer.Option("--ctx", help="Context in tokens: 32768 or 32k.")]
Chunk = Annotated[str, typer.Option("--chunk", help="Tokens a prefill step takes.")]
Drafts = Annotated[
    int, typer.Option("--drafts", help="Most drafted tokens that a pass of decode checks: 0 … 8.")
]
STATES = values("edge_kv.plan", "STORAGES")
Kv = Annotated[
    str,
    typer.Option(
        "--kv",
        help="State storage: f32, f16 or int8 (rings stay f32).",
        autocompletion=STATES,
    ),
]
_STORAGE = "Weight storage: int4, int8, none, or auto: as a quantised checkpoint has it, else int4."
Quant = Annotated[
    str,
    typer.Option(
        "--quant", help=_STORAGE, autocompletion=values("edge_kv.tensors", "SCHEMES", "auto")
    ),
]
Store = Annotated[
    list[str] | None,
    typer.Option("--store", help="Weight format of a kind of tensor, like embed=int8-f16; repeat."),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the JSON document here; - prints it.")
]
Json = Annotated[bool, flag("--json", "Print one JSON document instead of tables.")]
ENGINES = values("edge_kv.runtime", "ENGINES")
Engine = Annotated[
    str,
    typer.Option("--engine", help="Which runtime runs the artifact.", autocompletion=ENGINES),
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Threads; default: the physical cores.")
]
NoCache = Annotated[
    bool,
    flag("--no-cache", "Keep no packed weights for this device; use the heap."),
]
HugePages = Annotated[
    bool,
    flag("--huge-pages", "Copy the weights to huge pages: faster, needs their RAM."),
]
Check = Annotated[
    bool, flag("--check", "First compare every file with its digest, as verify does.")
]
Guesses = Annotated[
    str,
    typer.Option("--drafts", help="Guessed tokens fed at once: auto (where it pays), off, N."),
]
ArtifactDir = Annotated[Path, typer.Argument(help="The directory `edge-kv export` made.")]
