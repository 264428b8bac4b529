"""`edge-kv eval`: how well an artifact predicts a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_kv.cli.inputs import read_prompt
from edge_kv.cli.options import ArtifactDir, Engine, Json, NoCache, Threads
from edge_kv.cli.printing import print_json
from edge_kv.errors import ConfigError


def evaluate(
    artifact: ArtifactDir,
    text: Annotated[Path, typer.Option("--text", help="A UTF-8 text to predict.")],
    against: Annotated[
        str | None,
        typer.Option(
            "--against", help="Also compare with a float checkpoint: --weights of export."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Only the text's first tokens.", min=2)
    ] = None,
    window: Annotated[
        int, typer.Option("--window", help="Tokens that are read together.", min=2)
    ] = 512,
    engine: Engine = "onnx",
    threads: Threads = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """How well does it predict a text? Perplexity, and what was lost against a checkpoint."""
    from edge_kv.cli.report import print_evaluation
    from edge_kv.cli.terminal import Bar, output
    from edge_kv.guidance import open_artifact
    from edge_kv.runtime import Tokenizer, load
    from edge_kv.runtime.evaluate import evaluate as measure
    from edge_kv.runtime.evaluate import readable

    opened = open_artifact(artifact)
    content = read_prompt(None, text)
    tokenizer = Tokenizer.of(opened)
    reference = None
    if against:
        try:
            from edge_kv.reference import float_reference
        except ModuleNotFoundError as e:
            raise ConfigError(
                f"--against needs {e.name}, which is not installed; "
                "in the checkout, run: pip install '.[export]'"
            ) from e
        reference = float_reference(against, opened)
    ids = tokenizer.encode(content or "", start=False)[:tokens]
    start = tokenizer.encode("")
    with Bar() as bar, load(opened, engine, threads, cache=not no_cache) as session:
        bar.stage("tokens", "tokens")
        found = measure(
            session,
            ids,
            bos=start[0] if start else None,
            window=window,
            reference=reference,
            on_token=lambda done, total: bar.advance("predicted", done, total),
        )
    data = {
        "artifact": str(artifact),
        "engine": engine,
        "text": str(text),
        "checkpoint": against,
        **readable(found, lambda token: tokenizer.decode([token], special=True)),
    }
    if as_json:
        print_json(data)
    else:
        print_evaluation(data, output())
