"""`edge-kv export` as its user sees it: early refusals, progress, and what came out of it."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_kv import models
from edge_kv.amounts import size
from edge_kv.artifact import Artifact
from edge_kv.cli.terminal import Bar
from edge_kv.errors import Cancelled, EdgeKVError
from edge_kv.files import unfinished
from edge_kv.memory import COSTS, predict_artifact
from edge_kv.needs import count_needs
from edge_kv.request import (
    check_backend,
    check_output,
    check_packages,
    fetch_assistant,
    find_assistant,
    find_subject,
)
from edge_kv.shelf import size_of
from edge_kv.tensors import AUTO, storage

_SPACE = 1.1  # bytes an export takes of the disk for each byte of weights


@dataclass(frozen=True)
class Order:
    """What `export` is asked for, as its options say it."""

    model: str | None
    weights: str | None
    revision: str | None
    assistant: str | None
    ctx: int
    chunk: int
    drafts: int
    kv: str
    quant: str
    store: tuple[str, ...]
    changes: dict[str, str]
    backend: str
    attention: str
    calibration: str
    device: str
    out: Path | None


def carry_out(order: Order) -> tuple[Artifact, float]:
    """Export, after everything that can be refused early was looked at; (artifact, seconds).

    Raises:
        EdgeKVError: what is wrong, before a heavy import or a download where it can be known then.
        Cancelled: Ctrl-C; the message says how to go on.
    """
    began = time.monotonic()
    backends = check_backend(order.backend)
    storage(order.quant, (), {}, order.changes)  # refuses what is unknown before anything is read
    subject = find_subject(order.model, order.weights, order.revision)
    out = order.out or Path(f"{subject.name}-{order.ctx}")
    models.plan(subject.config, ctx=order.ctx, chunk=order.chunk, kv=order.kv, drafts=order.drafts)
    drafter = find_assistant(order.assistant, subject.config) if order.assistant else None
    check_packages(backends, subject.weights)
    held = subject.formats() if order.quant == AUTO else {}
    rows = models.weights(subject.config, drafter)
    scheme, formats = storage(order.quant, rows, held, order.changes)
    needs = count_needs(subject.config, scheme, formats, drafter)
    part = unfinished(out)
    written = size_of(part) if part.is_dir() else 0
    check_output(out, int(_SPACE * (needs.weight_file + needs.lookup_file)), written)
    be_quiet()
    try:
        with Bar() as bar:
            weights = subject.fetch(bar)
            assistant = order.assistant and fetch_assistant(order.assistant, bar)
            from edge_kv.export import export_model
            from edge_kv.runtime import load

            root = export_model(
                model=subject.model,
                weights=weights,
                assistant=assistant,
                ctx=order.ctx,
                chunk=order.chunk,
                drafts=order.drafts,
                kv=order.kv,
                quant=order.quant,
                store=order.store,
                backends=backends,
                attention=order.attention,
                calibration=order.calibration,
                device=order.device,
                out=out,
                open_session=load,
                progress=bar,
            )
    except KeyboardInterrupt as e:
        raise Cancelled(_interrupted(part)) from e
    from edge_kv.artifact import read_artifact

    return read_artifact(root), time.monotonic() - began


def be_quiet() -> None:
    """Keep the notices of torch, torchao, transformers and others from the user's screen."""
    warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())  # instead of the last resort: stderr


def _interrupted(part: Path) -> str:
    if not part.is_dir():
        return (
            "Interrupted before anything was written; the same command starts again, and a "
            "download goes on where it stopped."
        )
    return (
        f"Interrupted; the same command goes on where this one stopped. {part} holds "
        f"{size(size_of(part))}; remove it if you do not want to go on."
    )


def print_summary(made: Artifact, seconds: float, say: Callable[[str], None]) -> None:
    """What was made: size, time, what quantisation lost, planned memory, and what to do next."""
    from edge_kv.cli.report import parity_line, unused_line, unused_settings
    from edge_kv.runtime.base import lacks_plan, machine_base
    from edge_kv.runtime.template import Template

    name = made.root
    minutes, rest = divmod(round(seconds), 60)
    took = f"{minutes} min {rest} s" if minutes else f"{rest} s"
    say(f"Exported {name}: {size(size_of(name))} in {took}.")
    for backend in made.manifest.backends:
        if line := parity_line(made.parity(backend)):
            say(line)
            break
    if unused := unused_settings(made.manifest):
        say(unused_line(unused))
    engine = next((name for name in COSTS if name in made.manifest.backends), None)
    if engine and (lack := lacks_plan(engine)):
        say(f"No planned memory: {lack}")
    elif engine:
        memory = predict_artifact(made, engine=engine, base=machine_base(engine))
        say(
            f"Planned memory with all {made.plan.ctx:,} tokens in use: "
            f"{size(memory.conversation)}, of it {size(memory.stays)} that stays."
        )
    option = "" if engine in (None, "onnx") else f" --engine {engine}"
    text, chats = made.manifest.tokenizer, False
    try:
        chats = Template.of(made) is not None
    except EdgeKVError as e:
        say(f"It continues texts, but cannot chat: {e}")
    if text and not chats:
        option += " --raw"  # a base model goes on with a text, and answers nothing
    said = "'Hello'" if chats else "'Once upon a time'"
    say(f"Next: edge-kv run {name}{option} {said}" if text else f"Next: edge-kv bench {name}")
