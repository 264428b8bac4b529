"""`edge-kv export`: a checkpoint becomes an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_kv.cli.options import (
    Assistant,
    Chunk,
    Ctx,
    Drafts,
    Json,
    Kv,
    Model,
    Quant,
    Revision,
    Store,
    Weights,
    values,
)
from edge_kv.cli.printing import print_json, say


def export(
    ctx: Ctx,
    model: Model = None,
    weights: Weights = None,
    revision: Revision = None,
    assistant: Assistant = None,
    chunk: Chunk = "128",
    drafts: Drafts = 7,
    kv: Kv = "int8",
    quant: Quant = "auto",
    store: Store = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            help="Programs to export: onnx, executorch or both.",
            autocompletion=values("edge_kv.request", "BACKENDS"),
        ),
    ] = "onnx",
    attention: Annotated[
        str,
        typer.Option("--attention", help="Of ExecuTorch programs: native, or portable (stock)."),
    ] = "native",
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            help="Text that 4-bit weights are rounded for: shipped, none, or a file of yours.",
        ),
    ] = "shipped",
    device: Annotated[
        str, typer.Option("--device", help="What calibration computes on: cpu or cuda.")
    ] = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory to make; default: NAME-CTX.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Checkpoint -> artifact directory, parity proven. Prints the directory."""
    from edge_kv.amounts import parse_size
    from edge_kv.cli.export_screen import Order, carry_out, print_summary
    from edge_kv.tensors import parse_changes

    order = Order(
        model=model,
        weights=weights,
        revision=revision,
        assistant=assistant,
        ctx=parse_size(ctx),
        chunk=parse_size(chunk),
        drafts=drafts,
        kv=kv,
        quant=quant,
        store=tuple(store or ()),
        changes=parse_changes(store or ()),
        backend=backend,
        attention=attention,
        calibration=calibration,
        device=device,
        out=out,
    )
    made, seconds = carry_out(order)
    if as_json:
        from edge_kv.cli.report import artifact_data

        print_json({"artifact": str(made.root), "seconds": seconds, **artifact_data(made)})
    else:
        print_summary(made, seconds, say)
        typer.echo(made.root)
