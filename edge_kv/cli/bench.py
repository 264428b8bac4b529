"""`edge-kv bench`: speed and memory at real depth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_kv.cli.checks import check_target
from edge_kv.cli.options import ENGINES, ArtifactDir, HugePages, JsonFile, NoCache, Threads
from edge_kv.cli.printing import print_measured
from edge_kv.errors import ConfigError, RuntimeFault


def bench(
    artifact: ArtifactDir,
    ctx: Annotated[
        str, typer.Option("--ctx", help="Contexts to measure: 2k,8k,32k. Default: the artifact's.")
    ] = "",
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            help="Runtimes to measure: onnx, onnx-stock, executorch.",
            autocompletion=ENGINES,
        ),
    ] = "onnx",
    compare: Annotated[
        str | None, typer.Option("--compare", help="Also measure: torch (the eager decoder).")
    ] = None,
    threads: Threads = None,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of a timed prefill.")] = 512,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of a timed decode.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed rounds of each.")] = 3,
    fill: Annotated[
        str, typer.Option("--fill", help="How a depth is reached once: prefill, or random rows.")
    ] = "prefill",
    no_cache: NoCache = False,
    huge_pages: HugePages = False,
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw memory and speed into this .png.")
    ] = None,
) -> None:
    """Tokens/s, latency and peak RAM at real depth, against the plan, per runtime."""
    from edge_kv.amounts import parse_size
    from edge_kv.cli.report import print_bench
    from edge_kv.cli.terminal import Bar
    from edge_kv.guidance import open_artifact
    from edge_kv.runtime.bench import bench as measure

    if compare not in (None, "torch"):
        raise ConfigError(f"Unknown --compare {compare!r}; it can be torch.")
    for target in (json_file, plot):
        check_target(target)
    if plot:
        from edge_kv.cli.plots import check_plot

        check_plot(plot)
    opened = open_artifact(artifact)
    engines = [name.strip() for name in engine.split(",")]
    with Bar() as bar:
        document = measure(
            opened,
            [parse_size(c) for c in ctx.split(",")] if ctx else [opened.plan.ctx],
            engines=engines + ([compare] if compare else []),
            threads=threads,
            cache=not no_cache,
            huge_pages=huge_pages,
            prompt=prompt,
            tokens=tokens,
            repeats=repeats,
            fill=fill,
            modules={"torch": "edge_kv.compare"},
            progress=bar,
        )
    print_measured(document, json_file, print_bench)
    if plot:
        from edge_kv.cli.plots import plot_bench

        plot_bench(document, plot)
    if document["failures"]:
        raise RuntimeFault(
            f"{len(document['failures'])} measurement(s) failed, the first with: "
            f"{document['failures'][0]['error']}"
        )
