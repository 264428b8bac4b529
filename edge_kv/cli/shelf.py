"""`edge-kv inspect`, `list` and `cache`: what lies on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_kv.cli.options import ArtifactDir, Json, flag
from edge_kv.cli.printing import print_json
from edge_kv.errors import ConfigError


def inspect(artifact: ArtifactDir, as_json: Json = False) -> None:
    """What is in an artifact: layers, buffers, bytes, who reads what."""
    from edge_kv.cli.report import artifact_data, print_artifact
    from edge_kv.cli.terminal import output
    from edge_kv.guidance import open_artifact

    data = artifact_data(open_artifact(artifact))
    if as_json:
        print_json(data)
    else:
        print_artifact(data, output())


def list_artifacts(
    folder: Annotated[Path, typer.Argument(help="Where to look, and in the folders there.")] = Path(
        "."
    ),
    as_json: Json = False,
) -> None:
    """The artifacts in a folder: size, context, engines, quality."""
    from edge_kv.cli.report import listed_data, print_listed
    from edge_kv.cli.terminal import output
    from edge_kv.shelf import artifacts

    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a directory; name one that holds artifacts.")
    data = listed_data(artifacts(folder))
    if as_json:
        print_json({"artifacts": data})
    elif data:
        print_listed(data, output())
    else:
        typer.echo(f"There are no artifacts in {folder}; `edge-kv export` makes one.")


def cache(
    clear: Annotated[bool, flag("--clear", "Remove all of it.")] = False,
    as_json: Json = False,
) -> None:
    """What is kept for this machine (compiled libraries, packed weights), and how large it is."""
    from edge_kv.amounts import size
    from edge_kv.runtime.cache import cache_directory
    from edge_kv.shelf import cached
    from edge_kv.shelf import clear as remove

    directory = cache_directory()
    if clear:
        freed = remove(directory)
        typer.echo(f"Freed {size(freed)} in {directory}; what is needed is made again.")
        return
    held = cached(directory)
    total = sum(c.bytes for c in held)
    if as_json:
        kinds = [{"kind": c.kind, "entries": c.entries, "bytes": c.bytes} for c in held]
        print_json({"directory": str(directory), "bytes": total, "kinds": kinds})
        return
    for c in held:
        typer.echo(f"{size(c.bytes):>8}  {c.kind} ({c.path.name}/)")
    typer.echo(f"{size(total):>8}  together, in {directory}; `edge-kv cache --clear` removes it.")
