"""`edge-kv deploy`: an artifact and the runtime onto a board or a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_kv.cli.checks import check_target
from edge_kv.cli.options import ArtifactDir, JsonFile, flag
from edge_kv.cli.printing import print_measured
from edge_kv.errors import ConfigError


def deploy(
    artifact: ArtifactDir,
    target: Annotated[
        str | None,
        typer.Argument(
            help="user@host[:dir]; with --adb the phone's serial, if there are several."
        ),
    ] = None,
    adb: Annotated[bool, flag("--adb", "To a phone, with a runner that needs no Python.")] = False,
    engine: Annotated[
        str, typer.Option("--engine", help="Runtimes to install and measure: onnx, executorch.")
    ] = "onnx",
    ctx: Annotated[
        str, typer.Option("--ctx", help="Contexts to measure there: 512,2k. Default: up to 2k.")
    ] = "",
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of a timed decode.", min=1)] = 32,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed rounds of each.", min=1)] = 3,
    bench: Annotated[bool, flag("--bench/--no-bench", "Measure there, after verifying.")] = True,
    ssh: Annotated[
        str, typer.Option("--ssh", help="The ssh command with options: 'ssh -p 2222 -i KEY'.")
    ] = "ssh",
    wheels: Annotated[
        Path | None,
        typer.Option("--wheels", help="Wheels for a device without internet, from pip download."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Copy to a board or a phone what it lacks, verify and measure there, bring the JSON back."""
    from edge_kv.amounts import parse_size
    from edge_kv.cli.report import print_deploy
    from edge_kv.cli.terminal import Bar
    from edge_kv.deploy import deploy_to_board, deploy_to_phone
    from edge_kv.devices import parse_target
    from edge_kv.guidance import open_artifact

    opened = open_artifact(artifact, "deploy", target or "")
    check_target(json_file)
    with Bar() as bar:
        if adb:
            document = deploy_to_phone(opened, target, tokens=tokens, progress=bar)
        elif target is None:
            raise ConfigError("Name a device: user@host or user@host:dir, or --adb for a phone.")
        else:
            login, folder = parse_target(target)
            depths = (
                [parse_size(c) for c in ctx.split(",")] if ctx else [min(2048, opened.plan.ctx)]
            )
            options = [
                "--ctx", ",".join(map(str, depths)), "--tokens", str(tokens),
                "--repeats", str(repeats),
            ]  # fmt: skip
            document = deploy_to_board(
                opened,
                login,
                folder,
                ssh=ssh,
                engines=[name.strip() for name in engine.split(",")],
                bench=options if bench else None,
                wheels=wheels,
                progress=bar,
            )
    print_measured(document, json_file, print_deploy)
