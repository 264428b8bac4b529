"""Puts a server together from what the command line says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edge_kv.errors import ConfigError
from edge_kv.runtime.chat import Generator
from edge_kv.runtime.session import Session
from edge_kv.runtime.speculation import AUTO
from edge_kv.runtime.template import RAW_TEMPLATE, Template
from edge_kv.serve.app import Server, Settings, is_loopback, serve
from edge_kv.serve.states import States


def run_server(
    session: Session,
    settings: Settings,
    *,
    host: str,
    port: int,
    no_auth: bool = False,
    state: Path | None = None,
    conversations: int = 4,
    kept_ram: int | None = None,
    drafts: str = AUTO,
    ready: Callable[[str], None],
) -> None:
    """Serve `session` until a signal ends it.

    `state` is a folder that keeps conversations over restarts; without one they are kept in RAM,
    in at most `kept_ram` bytes. A base model, without a chat template, continues text as it stands.

    Raises:
        ConfigError: other machines could come in without a key, `state` cannot be made, or a pass
            does not take so many drafts.
        RuntimeFault: the address cannot be bound.
    """
    if not is_loopback(host):
        if not settings.api_key and not no_auth:
            raise ConfigError(
                f"{host} can be reached by other machines: set --api-key (or EDGE_KV_API_KEY), or "
                "say --no-auth to let everybody in."
            )
        settings = replace(settings, hosts=frozenset())
    if state:
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"Cannot make the folder {state} ({e.strerror}).") from e
    server = make_server(
        session, settings, state=state, conversations=conversations, kept_ram=kept_ram,
        drafts=drafts,
    )  # fmt: skip
    serve(server, host, port, ready=ready)


def make_server(
    session: Session,
    settings: Settings,
    *,
    state: Path | None = None,
    conversations: int = 4,
    kept_ram: int | None = None,
    drafts: str = AUTO,
) -> Server:
    """A server that listens nowhere yet; as `run_server`."""
    raw = Template(RAW_TEMPLATE)
    template = Template.of(session.artifact) or raw
    generator = Generator(session, template=template, drafts=drafts)
    states = States(generator, state, conversations, kept_ram)
    texts = Generator(session, generator.tokenizer, raw, drafts=generator.drafts)
    generator.on_prompt = texts.on_prompt = states.enter
    return Server(generator, texts, states, settings)
