"""`edge-kv serve`: an artifact behind OpenAI's HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_kv.cli.checks import base_of, check_digests, check_ram, planned_memory
from edge_kv.cli.options import (
    ArtifactDir,
    Check,
    Engine,
    Guesses,
    HugePages,
    NoCache,
    Threads,
    flag,
)
from edge_kv.cli.printing import say
from edge_kv.errors import ConfigError


def serve(
    artifact: ArtifactDir,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="Port; 0: a free one.", min=0, max=65535)
    ] = 8080,
    api_key: Annotated[
        str, typer.Option("--api-key", envvar="EDGE_KV_API_KEY", help="Key that clients must send.")
    ] = "",
    no_auth: Annotated[bool, flag("--no-auth", "Let other machines in without a key.")] = False,
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
        check_digests(opened)
    memory = planned_memory(opened, engine, base_of(engine), huge=huge_pages)
    if ram_limit:
        check_ram(opened, ram_limit, engine, memory, huge_pages)
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
    say("Stopped.")


def _listening(url: str, planned: int, kept: int) -> None:
    from edge_kv.amounts import size

    typer.echo(f"Listening on {url} (API at {url}/v1); Ctrl-C ends it.")
    aside = f", {size(kept)} of it for conversations kept aside" if kept else ""
    if planned:
        say(f"Planned peak: {size(planned)} of RAM{aside}.")
