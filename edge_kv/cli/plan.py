"""`edge-kv plan`: will it fit, and where are the bytes?"""

from __future__ import annotations

from typing import Annotated

import typer

from edge_kv.cli.options import (
    STATES,
    Assistant,
    Chunk,
    Drafts,
    Json,
    Model,
    Quant,
    Revision,
    Store,
    Weights,
    flag,
)
from edge_kv.cli.printing import print_json, say
from edge_kv.errors import ConfigError


def plan(
    ctx: Annotated[str, typer.Option("--ctx", help="Context in tokens: 32768 or 32k.")] = "",
    model: Model = None,
    weights: Weights = None,
    revision: Revision = None,
    assistant: Assistant = None,
    chunk: Chunk = "128",
    drafts: Drafts = 7,
    kv: Annotated[
        str | None,
        typer.Option(
            "--kv",
            help="State storage: f32, f16 or int8 (the default).",
            autocompletion=STATES,
        ),
    ] = None,
    quant: Quant = "auto",
    store: Store = None,
    fits: Annotated[
        str | None, typer.Option("--fits", help="Find what fits this much RAM: 2g.")
    ] = None,
    buffers: Annotated[bool, flag("--buffers", "Also list every table of the state.")] = False,
    as_json: Json = False,
) -> None:
    """Will it fit, and where are the bytes? Before anything is downloaded or built."""
    from edge_kv import models
    from edge_kv.amounts import parse_bytes, parse_size
    from edge_kv.cli.plan_report import fit_choices, fits_data, plan_data, print_fits, print_plan
    from edge_kv.cli.terminal import output
    from edge_kv.memory import COSTS
    from edge_kv.plan import STORAGES
    from edge_kv.request import find_assistant, find_subject
    from edge_kv.runtime.available import available_memory
    from edge_kv.runtime.base import lacks_plan, machine_base
    from edge_kv.tensors import AUTO, SCHEMES, parse_changes, storage

    if not ctx and not fits:
        raise ConfigError("Say how much context (--ctx 32768), or how much RAM (--fits 2g).")
    changes = parse_changes(store or ())
    storage(quant, (), {}, changes)  # refuses what is unknown before a config is fetched
    step = parse_size(chunk)
    length, limit = parse_size(ctx) if ctx else 0, parse_bytes(fits) if fits else 0
    subject = find_subject(model, weights, revision)
    if limit:
        kvs = (kv,) if kv else STORAGES
        quants = (quant,) if quant != AUTO else tuple(SCHEMES)
        base = machine_base("onnx")
        choices = fit_choices(subject.config, limit, step, base, kvs, quants)
        answer = fits_data(subject.name, limit, choices)
        if as_json:
            print_json(answer)
        else:
            named = f"--model {model}" if weights is None else f"--weights {weights}"
            print_fits(answer, choices, output(), named)
        return
    held = subject.formats() if quant == AUTO else {}
    drafter = find_assistant(assistant, subject.config) if assistant else None
    scheme, formats = storage(quant, models.weights(subject.config, drafter), held, changes)
    lack = lacks_plan("onnx")
    data = plan_data(
        subject.config, subject.name, length, step, kv or "int8", scheme, formats,
        {engine: machine_base(engine) for engine in COSTS},
        None if lack else available_memory(), drafts, drafter,
    )  # fmt: skip
    if as_json:
        print_json(data)
    else:
        print_plan(data, output(), buffers)
    if lack:
        say(f"Whether it fits this machine is not planned: {lack}")
