"""`edge-kv run`: one reply, or a conversation, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_kv.cli.checks import base_of, check_digests, check_ram, check_target, planned_memory
from edge_kv.cli.inputs import read_bias, read_grammar, read_prompt, read_tools
from edge_kv.cli.options import (
    ArtifactDir,
    Check,
    Engine,
    Guesses,
    HugePages,
    Json,
    NoCache,
    Threads,
    flag,
    values,
)
from edge_kv.cli.printing import print_json, say
from edge_kv.errors import ConfigError, PromptError, did_you_mean

if TYPE_CHECKING:
    from edge_kv.memory import Base
    from edge_kv.runtime.chat import Chat
    from edge_kv.runtime.generation import Slide
    from edge_kv.runtime.replies import Piece
    from edge_kv.runtime.session import Session


def run(
    artifact: ArtifactDir,
    prompt: Annotated[
        str | None, typer.Argument(help="Left out: read --file or stdin, or chat on a terminal.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Read the prompt from here.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt.")] = None,
    raw: Annotated[bool, flag("--raw", "No chat template: continue the text.")] = False,
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
            autocompletion=values("edge_kv.runtime.generation", "ON_FULL"),
        ),
    ] = "stop",
    drafts: Guesses = "auto",
    think: Annotated[
        str,
        typer.Option(
            "--think",
            help="Thinking before an answer: on, off, or auto (template).",
            autocompletion=values("edge_kv.cli.repl", "THINK"),
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
    from edge_kv.cli.repl import THINK, Terminal, converse, ended, unheard
    from edge_kv.guidance import open_artifact
    from edge_kv.runtime import load
    from edge_kv.runtime.base import COMMAND
    from edge_kv.runtime.chat import RAW_TEMPLATE, Chat, Message, Options, Template
    from edge_kv.runtime.text import clean_text

    limits = read_grammar(json_schema, regex, grammar)
    offered = read_tools(tools) if tools else ()
    if think not in THINK:
        raise ConfigError(f"Unknown --think {think!r}.{did_you_mean(think, THINK)}")
    opened = open_artifact(artifact, "run", prompt or "")
    check_target(snapshot)
    text = read_prompt(prompt, file)
    system = clean_text(system, "system prompt") if system else None
    if text is None and as_json:
        raise PromptError("--json needs a prompt: give one, --file FILE, or pipe it in.")
    if check:
        check_digests(opened)
    base = base_of(engine, COMMAND if text is not None else (*COMMAND, "prompt_toolkit"))
    if ram_limit:
        planned = planned_memory(opened, engine, base, huge=huge_pages)
        check_ram(opened, ram_limit, engine, planned, huge_pages)
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
        logit_bias=dict(map(read_bias, logit_bias or ())),
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
        if note := unheard(chat):
            say(note)
        if text is None:
            converse(chat, Terminal(partial(_show, chat), say, partial(_figures, chat, base)))
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
        print_json(summary)
    elif summary["decode_tokens"]:
        for line in (
            ended(chat, goes_on=False) if text is not None else "",
            _summary_line(summary),
        ):
            if line:
                say(line)


def _show(chat: Chat, pieces: Iterator[Piece]) -> None:
    """Stream one reply; Ctrl-C ends it and keeps what was said."""
    from edge_kv.cli.terminal import Stream
    from edge_kv.runtime.replies import CALL, THINKING

    with Stream(lambda: _status(chat.session)) as stream, closing(pieces):  # type: ignore[type-var]
        for piece in pieces:
            if piece.kind == CALL and piece.call:
                stream.write(f"{piece.call.name}({piece.text})\n")
            else:
                stream.write(piece.text, dim=piece.kind == THINKING)


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

    from edge_kv.runtime.chat import Reply
    from edge_kv.runtime.meter import read_memory

    session, reply = chat.session, chat.last or Reply("", (), 0, 0, 0.0, 0.0, finish="")
    stats = session.stats
    drafts = None if stats.drafted_tokens else 0
    planned = planned_memory(
        session.artifact, session.engine, base, max(1, session.written), drafts,
        huge=bool(stats.huge_page_bytes),
    )  # fmt: skip
    return {
        "text": reply.text,
        "thinking": reply.thinking,
        "finish": reply.finish,
        "stopped_by": reply.stopped_by,
        "ids": list(reply.ids),
        "prompt_tokens": reply.prompt_tokens,
        "reused_tokens": reply.reused_tokens,
        "calls": [asdict(c) for c in reply.calls],
        "logprobs": [asdict(p) for p in reply.logprobs],
        "first_token_seconds": reply.first_token_seconds,
        "load_seconds": stats.load_seconds,
        "prefill_tokens": stats.prefill_tokens,
        "prefill_rate": stats.prefill_rate,
        "decode_tokens": stats.decode_tokens,
        "decode_rate": stats.decode_rate,
        "decode_passes": stats.decode_passes,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "tokens_per_pass": stats.tokens_per_pass,
        "ties": reply.ties,
        "latency_p50": stats.latency(50),
        "latency_p95": stats.latency(95),
        "ctx_used": session.pos,
        "ctx": session.plan.ctx,
        "kv_bytes": stats.kv_bytes,
        "peak_bytes": read_memory().peak,
        "planned_peak_bytes": planned.conversation if planned else None,
    }


def _figures(chat: Chat, base: Base | None) -> str:
    return _summary_line(_summary(chat, base))


def _summary_line(summary: dict[str, Any]) -> str:
    from edge_kv.amounts import size
    from edge_kv.cli.repl import guesses

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
