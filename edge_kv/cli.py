"""The `edge-kv` command: each command parses, calls one function and prints.

Heavy imports happen inside commands; nothing here but `export` ever imports torch. Deliberate
errors are caught in one place and shown as one line on stderr, exit status 1.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import select
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from shutil import get_terminal_size
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from edge_kv import __version__
from edge_kv.errors import (
    Cancelled,
    ConfigError,
    EdgeKVError,
    MemoryLimitError,
    ParityError,
    PromptError,
    RuntimeFault,
    did_you_mean,
    one_line,
    unusable,
)
from edge_kv.signals import INTERRUPTED, end_on_signals, say_of_cut_files
from edge_kv.streams import open_streams

if TYPE_CHECKING:
    from edge_kv.artifact import Artifact
    from edge_kv.memory import Base, MemoryPlan
    from edge_kv.runtime.chat import Chat
    from edge_kv.runtime.constraints import Grammar
    from edge_kv.runtime.generation import Slide
    from edge_kv.runtime.messages import Tool
    from edge_kv.runtime.replies import Piece
    from edge_kv.runtime.session import Session


_USAGE: Any = typer.BadParameter.__mro__[1]  # UsageError of whichever click typer carries
_WORDS = "edge_kv.words"  # where a context keeps what was typed


class _Commands(TyperGroup):
    """The one place where errors become a line and an exit status."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        alone = not args
        ctx.meta[_WORDS] = list(args)
        try:
            return super().parse_args(ctx, args)
        except _USAGE as e:
            if alone:  # its message is the help
                raise
            _say_error(_usage(e, None, ctx.meta[_WORDS]))
            raise typer.Exit(2) from e

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            from edge_kv.guidance import command_for

            meant = command_for(args[0], self.list_commands(ctx))
            hint = f"Did you mean `edge-kv {meant}`?" if meant else "See `edge-kv --help`."
            _say_error(f"There is no command {args[0]!r}. {hint}")
            raise typer.Exit(2)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _USAGE as e:
            _say_error(_usage(e, ctx.invoked_subcommand, ctx.meta.get(_WORDS, ())))
            raise typer.Exit(2) from e
        except Cancelled as e:
            typer.echo(str(e), err=True)
            raise typer.Exit(INTERRUPTED) from e
        except EdgeKVError as e:
            _say_error(str(e))
            raise typer.Exit(1) from e
        except OSError as e:
            if e.errno == errno.EPIPE:  # whoever read this has gone
                raise
            _say_error(unusable(e))
            raise typer.Exit(1) from e
        except KeyboardInterrupt as e:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from e


def _say_error(text: str) -> None:
    typer.echo(f"Error: {one_line(text)}", err=True)


def _usage(error: Any, command: str | None, given: Sequence[str]) -> str:
    """What to say of the words `given`, of `command`, that the parser does not understand."""
    from edge_kv.guidance import usage_advice, whole_option

    found = error.ctx
    command = found.command.name if found and found.parent else command or ""
    options = (
        [o for p in found.command.params for o in p.opts if o.startswith("-")] if found else []
    )
    commands = found.command.commands if found and not found.parent else {}
    words = re.search(r"extra arguments?(?:\(s\))? \((.*)\)", error.format_message())
    parameter = getattr(error, "param", None)
    kind = type(error).__name__
    unknown = error.option_name if kind == "NoSuchOption" else ""
    if len(unknown) == 2 and unknown not in given:
        unknown = whole_option(unknown, given)
    return usage_advice(
        command,
        options,
        error.format_message(),
        unknown=unknown,
        elsewhere=next(
            (name for name, c in commands.items() if any(unknown in p.opts for p in c.params)), ""
        ),
        lacks=parameter.name if parameter and kind == "MissingParameter" else "",
        extra=words[1].split() if words else (),
        given=str(found.params.get("artifact") or "ARTIFACT") if found else "ARTIFACT",
        named=bool(found and (found.params.get("model") or found.params.get("weights"))),
    )


class _Notices(logging.Handler):
    """What the runtime has to say beside its results, one line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        # Not through typer, which writes past what draws on the terminal: bars are to stay below.
        print(record.getMessage(), file=sys.stderr, flush=True)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    help="KV-efficient language models from checkpoint to phone, with the memory known first.",
)


def main() -> None:
    """The command, from its arguments to its exit."""
    open_streams()
    end_on_signals()
    say_of_cut_files()
    app(prog_name="edge-kv")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edge-kv {__version__}")
        raise typer.Exit


def _flag(name: str, help: str, **more: Any) -> Any:
    """An option without a value: the help says no type, which would look like one."""
    return typer.Option(name, help=help, metavar="", **more)


@app.callback()
def _root(
    version: Annotated[
        bool,
        _flag("--version", "Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    notices = logging.getLogger("edge_kv")
    notices.handlers[:] = [_Notices()]
    notices.setLevel(logging.INFO)


def _values(module: str, name: str, *more: str) -> Any:
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
        autocompletion=_values("edge_kv.models", "ROWS"),
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
_STATES = _values("edge_kv.plan", "STORAGES")
Kv = Annotated[
    str,
    typer.Option(
        "--kv", help="State storage: f32, f16 or int8 (rings stay f32).", autocompletion=_STATES
    ),
]
_STORAGE = "Weight storage: int4, int8, none, or auto: as a quantised checkpoint has it, else int4."
Quant = Annotated[
    str,
    typer.Option(
        "--quant", help=_STORAGE, autocompletion=_values("edge_kv.tensors", "SCHEMES", "auto")
    ),
]
Store = Annotated[
    list[str] | None,
    typer.Option("--store", help="Weight format of a kind of tensor, like embed=int8-f16; repeat."),
]
Json = Annotated[bool, _flag("--json", "Print one JSON document instead of tables.")]
_ENGINES = _values("edge_kv.runtime", "ENGINES")
Engine = Annotated[
    str,
    typer.Option("--engine", help="Which runtime runs the artifact.", autocompletion=_ENGINES),
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Threads; default: the physical cores.")
]
NoCache = Annotated[
    bool,
    _flag("--no-cache", "Keep no packed weights for this device; use the heap."),
]
HugePages = Annotated[
    bool,
    _flag("--huge-pages", "Copy the weights to huge pages: faster, needs their RAM."),
]
Check = Annotated[
    bool, _flag("--check", "First compare every file with its digest, as verify does.")
]
Guesses = Annotated[
    str,
    typer.Option("--drafts", help="Guessed tokens fed at once: auto (where it pays), off, N."),
]
ArtifactDir = Annotated[Path, typer.Argument(help="The directory `edge-kv export` made.")]


@app.command()
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
            autocompletion=_STATES,
        ),
    ] = None,
    quant: Quant = "auto",
    store: Store = None,
    fits: Annotated[
        str | None, typer.Option("--fits", help="Find what fits this much RAM: 2g.")
    ] = None,
    buffers: Annotated[bool, _flag("--buffers", "Also list every table of the state.")] = False,
    as_json: Json = False,
) -> None:
    """Will it fit, and where are the bytes? Before anything is downloaded or built."""
    from edge_kv import models
    from edge_kv.amounts import parse_bytes, parse_size
    from edge_kv.memory import COSTS
    from edge_kv.plan import STORAGES
    from edge_kv.plan_report import fit_choices, fits_data, plan_data, print_fits, print_plan
    from edge_kv.request import find_assistant, find_subject
    from edge_kv.runtime.available import available_memory
    from edge_kv.runtime.base import lacks_plan, machine_base
    from edge_kv.tensors import AUTO, SCHEMES, parse_changes, storage
    from edge_kv.terminal import output

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
            _print_json(answer)
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
        _print_json(data)
    else:
        print_plan(data, output(), buffers)
    if lack:
        _say(f"Whether it fits this machine is not planned: {lack}")


@app.command()
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
            autocompletion=_values("edge_kv.request", "BACKENDS"),
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
    from edge_kv.export_screen import Order, carry_out, print_summary
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
        from edge_kv.report import artifact_data

        _print_json({"artifact": str(made.root), "seconds": seconds, **artifact_data(made)})
    else:
        print_summary(made, seconds, _say)
        typer.echo(made.root)


@app.command()
def run(
    artifact: ArtifactDir,
    prompt: Annotated[
        str | None, typer.Argument(help="Left out: read --file or stdin, or chat on a terminal.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Read the prompt from here.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt.")] = None,
    raw: Annotated[bool, _flag("--raw", "No chat template: continue the text.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Longest reply.", min=1)
    ] = 512,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 is greedy. Default: the checkpoint's.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Likeliest ids kept; 0: all.")
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Probability kept.")] = None,
    min_p: Annotated[
        float | None, typer.Option("--min-p", help="Kept against the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1 avoids what was said.")
    ] = None,
    frequency_penalty: Annotated[
        float,
        typer.Option("--frequency-penalty", help="Taken from a logit each time its id was said."),
    ] = 0.0,
    presence_penalty: Annotated[
        float, typer.Option("--presence-penalty", help="Taken from the logit of an id once said.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")] = None,
    on_full: Annotated[
        str,
        typer.Option(
            "--on-full",
            help="Context full: stop, or slide (forget the middle).",
            autocompletion=_values("edge_kv.runtime.generation", "ON_FULL"),
        ),
    ] = "stop",
    drafts: Guesses = "auto",
    think: Annotated[
        str,
        typer.Option(
            "--think",
            help="Thinking before an answer: on, off, or auto (template).",
            autocompletion=_values("edge_kv.repl", "THINK"),
        ),
    ] = "auto",
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A text that ends a reply; may be repeated.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", help="Replies are JSON of this schema.")
    ] = None,
    regex: Annotated[str | None, typer.Option("--regex", help="Replies match this.")] = None,
    grammar: Annotated[
        Path | None, typer.Option("--grammar", help="Replies are of this Lark grammar.")
    ] = None,
    tools: Annotated[
        Path | None, typer.Option("--tools", help="JSON list of tools that replies may call.")
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option("--logit-bias", help="ID=BIAS: makes a token likelier; may be repeated."),
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="With --json: log-probabilities, of N ids.")
    ] = None,
    engine: Engine = "onnx",
    threads: Threads = None,
    ram_limit: Annotated[
        str | None, typer.Option("--ram-limit", help="Refuse when more RAM is planned: 2g.")
    ] = None,
    restore: Annotated[
        Path | None, typer.Option("--restore", help="Take up a saved conversation first.")
    ] = None,
    snapshot: Annotated[
        Path | None, typer.Option("--snapshot", help="Save the conversation at the end.")
    ] = None,
    check: Check = False,
    no_cache: NoCache = False,
    huge_pages: HugePages = False,
    as_json: Json = False,
) -> None:
    """Stream tokens on this machine: one reply, or a conversation."""
    from edge_kv.guidance import open_artifact
    from edge_kv.repl import THINK, Terminal, converse, ended
    from edge_kv.runtime import load
    from edge_kv.runtime.base import COMMAND
    from edge_kv.runtime.chat import RAW_TEMPLATE, Chat, Message, Options, Template
    from edge_kv.runtime.text import clean_text

    limits = _grammar(json_schema, regex, grammar)
    offered = _tools(tools) if tools else ()
    if think not in THINK:
        raise ConfigError(f"Unknown --think {think!r}.{did_you_mean(think, THINK)}")
    opened = open_artifact(artifact, "run", prompt or "")
    _check_target(snapshot)
    text = _prompt(prompt, file)
    system = clean_text(system, "system prompt") if system else None
    if text is None and as_json:
        raise PromptError("--json needs a prompt: give one, --file FILE, or pipe it in.")
    if check:
        _check_digests(opened)
    base = _base(engine, COMMAND if text is not None else (*COMMAND, "prompt_toolkit"))
    if ram_limit:
        planned = _planned(opened, engine, base, huge=huge_pages)
        _check_ram(opened, ram_limit, engine, planned, huge_pages)
    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        seed=seed,
        on_full=on_full,
        stop=tuple(stop or ()),
        think=THINK[think],
        logit_bias=dict(map(_bias, logit_bias or ())),
        logprobs=logprobs,
    )
    with load(opened, engine, threads, not no_cache, huge_pages) as session:
        chat = Chat(
            session,
            template=Template(RAW_TEMPLATE) if raw else None,
            options=options,
            system=system,
            tools=offered,
            grammar=limits,
            on_slide=_say_slide,
            drafts=drafts,
        )
        if restore:
            chat.load(restore)
        if text is None:
            converse(chat, Terminal(lambda p: _show(chat, p), _say, lambda: _stats(chat, base)))
        else:
            pieces = chat.ask(Message("user", text))
            if as_json:
                for _ in pieces:
                    pass
            else:
                _show(chat, pieces)
        if snapshot:
            chat.save(snapshot)
        summary = _summary(chat, base)
    if as_json:
        _print_json(summary)
    elif summary["decode_tokens"]:
        for line in (ended(chat) if text is not None else "", _summary_line(summary)):
            if line:
                _say(line)


@app.command()
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
            autocompletion=_ENGINES,
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
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the JSON document here; - prints it.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw memory and speed into this .png.")
    ] = None,
) -> None:
    """Tokens/s, latency and peak RAM at real depth, against the plan, per runtime."""
    from edge_kv.amounts import parse_size
    from edge_kv.guidance import open_artifact
    from edge_kv.report import print_bench
    from edge_kv.runtime.bench import bench as measure
    from edge_kv.terminal import Bar, output

    if compare not in (None, "torch"):
        raise ConfigError(f"Unknown --compare {compare!r}; it can be torch.")
    for target in (json_file, plot):
        _check_target(target)
    if plot:
        from edge_kv.plots import check_plot

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
    text = json.dumps(document, indent=1)
    if str(json_file) == "-":
        typer.echo(text)
    else:
        print_bench(document, output())
    if json_file and str(json_file) != "-":
        _write_json(json_file, text)
    if plot:
        from edge_kv.plots import plot_bench

        plot_bench(document, plot)
    if document["failures"]:
        raise RuntimeFault(
            f"{len(document['failures'])} measurement(s) failed, the first with: "
            f"{document['failures'][0]['error']}"
        )


@app.command()
def inspect(artifact: ArtifactDir, as_json: Json = False) -> None:
    """What is in an artifact: layers, buffers, bytes, who reads what."""
    from edge_kv.guidance import open_artifact
    from edge_kv.report import artifact_data, print_artifact
    from edge_kv.terminal import output

    data = artifact_data(open_artifact(artifact))
    if as_json:
        _print_json(data)
    else:
        print_artifact(data, output())


@app.command(name="list")
def list_artifacts(
    folder: Annotated[Path, typer.Argument(help="Where to look, and in the folders there.")] = Path(
        "."
    ),
    as_json: Json = False,
) -> None:
    """The artifacts in a folder: size, context, engines, quality."""
    from edge_kv.report import listed_data, print_listed
    from edge_kv.shelf import artifacts
    from edge_kv.terminal import output

    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a directory; name one that holds artifacts.")
    data = listed_data(artifacts(folder))
    if as_json:
        _print_json({"artifacts": data})
    elif data:
        print_listed(data, output())
    else:
        typer.echo(f"There are no artifacts in {folder}; `edge-kv export` makes one.")


@app.command()
def cache(
    clear: Annotated[bool, _flag("--clear", "Remove all of it.")] = False,
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
        _print_json({"directory": str(directory), "bytes": total, "kinds": kinds})
        return
    for c in held:
        typer.echo(f"{size(c.bytes):>8}  {c.kind} ({c.path.name}/)")
    typer.echo(f"{size(total):>8}  together, in {directory}; `edge-kv cache --clear` removes it.")


@app.command()
def verify(
    artifact: ArtifactDir,
    engine: Engine = "onnx",
    threads: Threads = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Integrity and parity again, on this device: digests, then the stored reference logits."""
    from dataclasses import asdict

    from edge_kv.guidance import open_artifact
    from edge_kv.runtime import load
    from edge_kv.runtime.verify import verify as compare
    from edge_kv.terminal import Bar

    opened = open_artifact(artifact)
    total = _check_digests(opened)
    with Bar() as bar:
        bar.stage("parity", "steps")
        with load(opened, engine, threads, cache=not no_cache) as session:
            parity = compare(session, lambda step, steps: bar.advance("steps", step, steps))
    data = {
        "artifact": str(artifact),
        "engine": engine,
        "files": len(opened.manifest.files),
        "bytes": total,
        **asdict(parity),
        "passed": parity.passed,
    }
    line = (
        f"max |Δlogit| {parity.max_abs:.3g}, KL mean {parity.mean_kl:.3g} max {parity.max_kl:.3g} "
        f"(limit {parity.limit_kl:.3g}), top-1 {parity.top1:.1%} (limit {parity.limit_top1:.1%}) "
        f"over {parity.steps} steps"
    )
    if drafts := parity.draft:
        line += (
            f"; drafts of its assistant: max |Δlogit| {drafts.max_abs:.3g}, KL mean "
            f"{drafts.mean_kl:.3g} max {drafts.max_kl:.3g} (limit {drafts.limit_kl:.3g}), top-1 "
            f"{drafts.top1:.1%} (limit {drafts.limit_top1:.1%}), {drafts.common:.1%} of the tokens "
            f"(limit {drafts.limit_common:.1%}), over {drafts.drafts} drafts"
        )
    elif opened.manifest.drafter:
        line += "; its assistant was not checked: no reference drafts are recorded, export again"
    if as_json:
        _print_json(data)
    elif parity.passed:
        files = len(opened.manifest.files)
        typer.echo(_wrapped(f"{files} files unchanged; {line}.", sys.stdout))
    if not parity.passed:
        raise ParityError(f"{artifact} computes something else on this machine: {line}.")


@app.command(name="eval")
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
    from edge_kv.guidance import open_artifact
    from edge_kv.report import print_evaluation
    from edge_kv.runtime import Tokenizer, load
    from edge_kv.runtime.evaluate import evaluate as measure
    from edge_kv.runtime.evaluate import readable
    from edge_kv.terminal import Bar, output

    opened = open_artifact(artifact)
    content = _prompt(None, text)
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
        _print_json(data)
    else:
        print_evaluation(data, output())


@app.command()
def deploy(
    artifact: ArtifactDir,
    target: Annotated[
        str | None,
        typer.Argument(
            help="user@host[:dir]; with --adb the phone's serial, if there are several."
        ),
    ] = None,
    adb: Annotated[bool, _flag("--adb", "To a phone, with a runner that needs no Python.")] = False,
    engine: Annotated[
        str, typer.Option("--engine", help="Runtimes to install and measure: onnx, executorch.")
    ] = "onnx",
    ctx: Annotated[
        str, typer.Option("--ctx", help="Contexts to measure there: 512,2k. Default: up to 2k.")
    ] = "",
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of a timed decode.", min=1)] = 32,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed rounds of each.", min=1)] = 3,
    bench: Annotated[bool, _flag("--bench/--no-bench", "Measure there, after verifying.")] = True,
    ssh: Annotated[
        str, typer.Option("--ssh", help="The ssh command with options: 'ssh -p 2222 -i KEY'.")
    ] = "ssh",
    wheels: Annotated[
        Path | None,
        typer.Option("--wheels", help="Wheels for a device without internet, from pip download."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the JSON document here; - prints it.")
    ] = None,
) -> None:
    """Copy to a board or a phone what it lacks, verify and measure there, bring the JSON back."""
    from edge_kv.amounts import parse_size
    from edge_kv.deploy import deploy_to_board, deploy_to_phone
    from edge_kv.devices import parse_target
    from edge_kv.guidance import open_artifact
    from edge_kv.report import print_deploy
    from edge_kv.terminal import Bar, output

    opened = open_artifact(artifact, "deploy", target or "")
    _check_target(json_file)
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
    text = json.dumps(document, indent=1)
    if str(json_file) == "-":
        typer.echo(text)
        return
    print_deploy(document, output())
    if json_file:
        _write_json(json_file, text)


@app.command()
def serve(
    artifact: ArtifactDir,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="Port; 0: a free one.", min=0, max=65535)
    ] = 8080,
    api_key: Annotated[
        str, typer.Option("--api-key", envvar="EDGE_KV_API_KEY", help="Key that clients must send.")
    ] = "",
    no_auth: Annotated[bool, _flag("--no-auth", "Let other machines in without a key.")] = False,
    origin: Annotated[
        list[str] | None,
        typer.Option("--origin", help="Web site whose pages may ask, or *; repeat for more."),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="Folder that keeps conversations over restarts."),
    ] = None,
    conversations: Annotated[
        int,
        typer.Option("--conversations", help="Conversations kept aside.", min=0),
    ] = 4,
    queue: Annotated[int, typer.Option("--queue", help="Requests that may wait.", min=0)] = 16,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for one request.")] = 600.0,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Longest reply, unless a request says.", min=1)
    ] = 1024,
    engine: Engine = "onnx",
    threads: Threads = None,
    check: Check = False,
    no_cache: NoCache = False,
    huge_pages: HugePages = False,
    drafts: Guesses = "auto",
    ram_limit: Annotated[
        str | None, typer.Option("--ram-limit", help="Refuse to start if the plan needs more: 2g.")
    ] = None,
) -> None:
    """Behind OpenAI's HTTP API, with a page to chat in and figures for monitoring."""
    from edge_kv.amounts import parse_bytes
    from edge_kv.guidance import open_artifact
    from edge_kv.memory import with_margin
    from edge_kv.runtime import load

    try:
        from edge_kv.serve.app import Settings, most_bytes
        from edge_kv.serve.command import run_server
        from edge_kv.serve.states import SERVER_BYTES, kept_bytes
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"Serving needs {e.name}, which is not installed; in the checkout, run: "
            "pip install '.[serve]'"
        ) from e
    opened = open_artifact(artifact)
    if check:
        _check_digests(opened)
    memory = _planned(opened, engine, _base(engine), huge=huge_pages)
    if ram_limit:
        _check_ram(opened, ram_limit, engine, memory, huge_pages)
    limit = parse_bytes(ram_limit) if ram_limit else 0
    kept = kept_bytes(memory, conversations) if memory and not state else 0
    if limit and memory:
        kept = max(0, min(kept, limit - with_margin(memory.conversation) - SERVER_BYTES))
    settings = Settings(
        api_key=api_key,
        origins=tuple(origin or ()),
        waiting=queue,
        timeout=timeout,
        body=most_bytes(opened.plan.ctx),
        max_tokens=max_new_tokens,
        planned=memory.conversation + SERVER_BYTES + kept if memory else 0,
        limit=limit,
    )
    with load(opened, engine, threads, not no_cache, huge_pages) as session:
        run_server(
            session,
            settings,
            host=host,
            port=port,
            no_auth=no_auth,
            state=state,
            conversations=conversations,
            kept_ram=kept if memory else None,
            drafts=drafts,
            ready=lambda url: _listening(url, settings.planned, kept),
        )


def _listening(url: str, planned: int, kept: int) -> None:
    from edge_kv.amounts import size

    typer.echo(f"Listening on {url} (API at {url}/v1); Ctrl-C ends it.")
    aside = f", {size(kept)} of it for conversations kept aside" if kept else ""
    if planned:
        _say(f"Planned peak: {size(planned)} of RAM{aside}.")


_PIPE_SECONDS = 3.0  # how long a pipe beside a prompt may stay silent


def _prompt(prompt: str | None, file: Path | None) -> str | None:
    """The prompt from the argument, --file and stdin; None to converse on a terminal.

    What is piped in follows the argument; `-` is stdin alone.
    """
    if prompt is not None and file is not None:
        raise PromptError("Both a prompt and --file were given; give one of them.")
    from edge_kv.runtime.text import clean_text

    try:
        if file is not None:
            text = clean_text(_content(file))
        elif prompt is not None and prompt != "-":
            piped = clean_text(_piped())
            text = "\n\n".join(t for t in (clean_text(prompt), piped) if t.strip())
        elif prompt is None and sys.stdin.isatty():
            return None
        else:
            text = clean_text(_content())
    except OSError as e:
        raise PromptError(f"Cannot read {file or 'standard input'}: {e.strerror}.") from e
    if not text.strip():
        raise PromptError("The prompt is empty; give some text.")
    return text


def _planned(
    artifact: Artifact, engine: str, base: Base | None, depth: int | None = None,
    drafts: int | None = None, huge: bool = False,
) -> MemoryPlan | None:  # fmt: skip
    """The memory plan of `artifact` over what this process held before it (`_base`)."""
    from edge_kv.memory import predict_artifact

    if base is None:
        return None
    return predict_artifact(artifact, depth, engine=engine, base=base, drafts=drafts, huge=huge)


def _base(engine: str, imports: tuple[str, ...] = ()) -> Base | None:
    """What this process holds before a session is opened, with what it will import of `imports`;
    None for an engine without a plan."""
    from edge_kv.runtime.base import planned_base

    return planned_base(engine, imports)


def _piped() -> bytes:
    """What a file or a pipe on stdin holds; nothing for terminals and devices."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # no stdin, or one without a file behind it
        buffer = getattr(sys.stdin, "buffer", None)
        return buffer.read() if buffer and not sys.stdin.isatty() else b""
    if stat.S_ISREG(mode):
        return _content()
    if not stat.S_ISFIFO(mode):
        return b""
    waits = os.name == "posix"  # elsewhere a pipe cannot be waited for
    if waits and not select.select([sys.stdin], [], [], _PIPE_SECONDS)[0]:
        _say("Nothing came through the pipe on stdin; answering the prompt alone.")
        return b""
    return _content()


def _content(path: Path | None = None) -> bytes:
    """What a file of the user's holds, or stdin, up to the length of any text."""
    from edge_kv.files import read_bounded

    with path.open("rb") if path else nullcontext(sys.stdin.buffer) as f:
        return read_bounded(f)


def _grammar(schema: Path | None, regex: str | None, lark: Path | None) -> Grammar | None:
    """What replies must be, from at most one of the options."""
    from edge_kv.runtime.constraints import Grammar

    if sum(o is not None for o in (schema, regex, lark)) > 1:
        raise ConfigError("Give one of --json-schema, --regex and --grammar.")
    try:
        if schema:
            return Grammar.json_schema(_content(schema).decode())
        if lark:
            return Grammar.lark(_content(lark).decode())
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise ConfigError(f"Cannot read {schema or lark} ({why}).") from e
    return Grammar.regex(regex) if regex is not None else None


def _bias(text: str) -> tuple[int, float]:
    """A token id and what is added to its logit, from ID=BIAS."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as e:
        raise ConfigError(f"--logit-bias {text!r} must be ID=BIAS, such as 107=-100.") from e


def _tools(path: Path) -> tuple[Tool, ...]:
    """The tools that a file lists, in OpenAI's shape."""
    from edge_kv.runtime.messages import Tool

    try:
        listed = json.loads(_content(path))
    except (OSError, ValueError, RecursionError) as e:
        why = e.strerror if isinstance(e, OSError) else f"it is not JSON: {e}"
        raise ConfigError(f"Cannot read the tools in {path} ({why}).") from e
    if not isinstance(listed, list):
        raise ConfigError(f"{path} must hold a JSON list of tools, not {type(listed).__name__}.")
    return tuple(Tool.of(tool, f"{path}[{i}]") for i, tool in enumerate(listed))


def _check_digests(artifact: Artifact) -> int:
    """Compare every file with its digest; returns their bytes."""
    from edge_kv.terminal import Bar

    total, done = sum(f.size for f in artifact.manifest.files.values()), 0
    with Bar() as bar:
        bar.stage("digests")
        for name, count in artifact.check_digests():
            done += count
            bar.advance(name, done, total)
    return total


def _check_target(path: Path | None) -> None:
    """Refuse a file that cannot be written, before work whose result it is to hold.

    Raises:
        ConfigError: its directory is missing or read-only, or it is a directory.
    """
    if path is None or str(path) == "-":
        return
    parent = path.absolute().parent
    if path.is_dir():
        raise ConfigError(f"Cannot write {path}: it is a directory.")
    if not parent.is_dir():
        raise ConfigError(f"Cannot write {path}: its directory does not exist.")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise ConfigError(f"Cannot write {path}: permission denied.")


def _write_json(path: Path, text: str) -> None:
    from edge_kv.files import write_text

    try:
        write_text(path, text + "\n")
    except OSError as e:
        raise ConfigError(f"Cannot write {path}: {e.strerror}.") from e


def _check_ram(
    artifact: Artifact, limit: str, engine: str, planned: MemoryPlan | None, huge_pages: bool
) -> None:
    """Refuse a run that is `planned` to need more than `limit`, or might.

    Raises:
        ConfigError: no amount of memory, or an engine without a plan.
        MemoryLimitError: it could need more.
    """
    from edge_kv.amounts import parse_bytes, size
    from edge_kv.memory import COSTS, with_margin

    allowed = parse_bytes(limit)
    if planned is None and engine in COSTS:
        raise ConfigError(
            f"--ram-limit needs a memory plan, and there is none for {engine} without its native "
            "operators; install a C++ compiler (Debian and Ubuntu: apt install g++)."
        )
    if planned is None:
        raise ConfigError(
            f"--ram-limit needs a memory plan, and there is none for {engine}; use "
            f"--engine {' or '.join(COSTS)}."
        )
    needed = with_margin(planned.conversation)
    if needed > allowed:
        raise MemoryLimitError(
            f"{artifact.root} is planned to need up to {size(needed)} of RAM, the limit is "
            f"{size(allowed)}; {'leave out --huge-pages, or ' if huge_pages else ''}"
            "export with a smaller --ctx, --quant int4 or --kv int8."
        )


def _show(chat: Chat, pieces: Iterator[Piece]) -> None:
    """Stream one reply; Ctrl-C ends it and keeps what was said."""
    from edge_kv.runtime.replies import CALL, THINKING
    from edge_kv.terminal import Stream

    with Stream(lambda: _status(chat.session)) as stream, closing(pieces):  # type: ignore[type-var]
        for piece in pieces:
            if piece.kind == CALL and piece.call:
                stream.write(f"{piece.call.name}({piece.text})\n")
            else:
                stream.write(piece.text, dim=piece.kind == THINKING)


def _say(text: str) -> None:
    """Lines on stderr, broken between words."""
    typer.echo(_wrapped(text, sys.stderr), err=True)


def _wrapped(text: str, stream: TextIO) -> str:
    """`text` broken between words where a terminal would break it anywhere."""
    if not stream.isatty():
        return text
    columns = get_terminal_size().columns
    wrapper = TextWrapper(columns, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrapper.fill(line) for line in text.split("\n"))


def _stats(chat: Chat, base: Base | None) -> str:
    return _summary_line(_summary(chat, base))


def _status(session: Session) -> str:
    from edge_kv.amounts import size
    from edge_kv.runtime.meter import resident

    stats, memory = session.stats, resident()
    speed = (
        f"{stats.decode_rate:.1f} tokens/s"
        if stats.decode_tokens
        else f"reading at {stats.prefill_rate:.0f} tokens/s"
    )
    drafts = f" · {stats.tokens_per_pass:.1f} a pass" if stats.drafted_tokens else ""
    return (
        f"{speed}{drafts} · {session.pos:,}/{session.plan.ctx:,} tokens"
        f"{f' · {size(memory)}' if memory else ''}"
    )


def _say_slide(slide: Slide) -> None:
    typer.echo(
        f"(context full: kept the first {slide.kept_first} and the last {slide.kept_last} tokens, "
        f"forgot {slide.forgotten} between)",
        err=True,
    )


def _summary(chat: Chat, base: Base | None) -> dict[str, Any]:
    """What the run was and cost; seconds, bytes, tokens a second."""
    from dataclasses import asdict

    from edge_kv.runtime.meter import read_memory

    session, reply = chat.session, chat.last
    stats = session.stats
    drafts = None if stats.drafted_tokens else 0
    planned = _planned(
        session.artifact, session.engine, base, max(1, session.written), drafts,
        huge=bool(stats.huge_page_bytes),
    )  # fmt: skip
    return {
        "text": reply.text if reply else "",
        "thinking": reply.thinking if reply else "",
        "finish": reply.finish if reply else "",
        "stopped_by": reply.stopped_by if reply else "",
        "ids": list(reply.ids) if reply else [],
        "prompt_tokens": reply.prompt_tokens if reply else 0,
        "reused_tokens": reply.reused_tokens if reply else 0,
        "calls": [asdict(c) for c in reply.calls] if reply else [],
        "logprobs": [asdict(p) for p in reply.logprobs] if reply else [],
        "first_token_seconds": reply.first_token_seconds if reply else 0.0,
        "load_seconds": stats.load_seconds,
        "prefill_tokens": stats.prefill_tokens,
        "prefill_rate": stats.prefill_rate,
        "decode_tokens": stats.decode_tokens,
        "decode_rate": stats.decode_rate,
        "decode_passes": stats.decode_passes,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "tokens_per_pass": stats.tokens_per_pass,
        "ties": reply.ties if reply else 0,
        "latency_p50": stats.latency(50),
        "latency_p95": stats.latency(95),
        "ctx_used": session.pos,
        "ctx": session.plan.ctx,
        "kv_bytes": stats.kv_bytes,
        "peak_bytes": read_memory().peak,
        "planned_peak_bytes": planned.conversation if planned else None,
    }


def _summary_line(summary: dict[str, Any]) -> str:
    from edge_kv.amounts import size
    from edge_kv.repl import guesses

    peak, planned = summary["peak_bytes"], summary["planned_peak_bytes"]
    drafted, drafts = summary["drafted_tokens"], ""
    if drafted:
        right = guesses(summary["accepted_tokens"], drafted, summary["ties"])
        drafts = f"{summary['tokens_per_pass']:.2f} tokens a pass ({right}) · "
    return (
        f"first token {summary['first_token_seconds']:.2f} s · "
        f"prefill {summary['prefill_rate']:.1f} tokens/s · "
        f"decode {summary['decode_rate']:.1f} tokens/s "
        f"(p50 {1e3 * summary['latency_p50']:.1f} ms, p95 {1e3 * summary['latency_p95']:.1f} ms) · "
        f"{drafts}"
        f"{summary['ctx_used']:,}/{summary['ctx']:,} tokens · "
        f"peak RSS {size(peak) if peak else 'unknown'}"
        + (f", planned {size(planned)}" if planned else "")
    )


def _print_json(data: dict[str, Any]) -> None:
    text = json.dumps(data, ensure_ascii=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeError:  # a stream of fewer characters: escapes lose none of them
        text = json.dumps(data, default=str)
    typer.echo(text)
