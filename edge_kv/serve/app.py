"""`edge-kv serve`: one artifact behind OpenAI's HTTP API, with a page and figures for monitoring.

    POST /v1/chat/completions, /v1/completions    replies, whole or streamed
    POST /v1/responses                            the same as items and named events
    GET  /v1/models, /v1/models/NAME              the one model
    GET  /                                        a page to chat in, with a live meter of memory
    GET  /status                                  what that page shows, as JSON
    GET  /healthz, /metrics                       for supervisors and Prometheus

Replies are made by one thread (`worker`); requests wait in a bounded, fair queue. Nothing a client
sends is a path, a template or code.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import re
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_kv import __version__
from edge_kv.errors import ContextFullError, EdgeKVError, MemoryLimitError, RuntimeFault
from edge_kv.runtime.chat import CANCELLED, Generator, Piece, Reply, Turn
from edge_kv.runtime.messages import Message
from edge_kv.runtime.meter import read_memory
from edge_kv.serve import schema
from edge_kv.serve.responses import ResponsesAnswer, ResponsesRequest
from edge_kv.serve.states import States
from edge_kv.serve.worker import Begin, Job, QueueFull, TimeIsUp, Worker
from edge_kv.signals import hang_up

STATIC = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_OPEN = frozenset({*STATIC, "/healthz"})  # no key is asked for: they tell nothing
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
# A name or address and perhaps a port: nothing that a URL made of it could take for a path.
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:/?#@\[\]\\\s]+))(?::[0-9]{1,5})?", re.IGNORECASE)
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # bounds of the histograms
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.5  # how often a request looks whether its client is still there


@dataclass(frozen=True)
class Settings:
    """How a server behaves; sizes in bytes, times in seconds."""

    api_key: str = ""  # empty: none is asked for
    hosts: frozenset[str] = _LOOPBACK_NAMES  # names a request may be addressed to; empty: any
    origins: tuple[str, ...] = ()  # browsers of other sites that may ask, "*" for all
    waiting: int = 16
    timeout: float = 600.0
    body: int = 4 << 20
    max_tokens: int = 1024  # of a reply, where the request does not say
    planned: int = 0  # peak RAM as planned
    limit: int = 0  # RAM the user allows; 0: none


def most_bytes(ctx: int) -> int:
    """Of a request body, for a context of `ctx` tokens.

    What cannot fit is refused before it is made tokens of: that takes a quarter of a kilobyte of
    RAM for each byte, and the decoder's time.
    """
    return min(Settings.body, (64 << 10) + 16 * ctx)


def is_loopback(host: str) -> bool:
    """Whether a server bound to `host` is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Metrics:
    """What `/metrics` reports."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"edge_kv_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"edge_kv_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"edge_kv_{name}", text, buckets=_SECONDS, registry=self.registry)

        self.requests = counter("requests", "Requests by outcome.", "outcome")
        self.prompt = counter("prompt_tokens", "Tokens of prompts.")
        self.cached = counter("cached_tokens", "Of them, tokens not read again.")
        self.made = counter("generated_tokens", "Tokens of replies.")
        self.passes = counter("decode_passes", "Runs of the model for tokens of replies.")
        self.drafted = counter("drafted_tokens", "Drafts that were fed.")
        self.accepted = counter("accepted_tokens", "Of them, those that came.")
        self.ties = counter("ties", "Choices beside drafts that rounding may turn round.")
        self.first = histogram("first_token_seconds", "From the question to the first token.")
        self.seconds = histogram("reply_seconds", "From the question to the end of the reply.")
        self.memory = gauge("memory_bytes", "Resident memory by kind.", "kind")
        self.context = gauge("context_tokens", "Tokens of context held.")
        self.queue = gauge("queued_requests", "Requests that wait.")
        self.kept = gauge("kept_conversations", "Conversations kept aside.")
        self.kept_bytes = gauge("kept_bytes", "Bytes of them; what they share counts once.")
        self.restored = counter("restored_conversations", "Times one was taken up.")


class Server:
    """The application's state: one generator, its worker, and what was measured."""

    def __init__(
        self, generator: Generator, raw: Generator, states: States, settings: Settings
    ) -> None:
        """`raw` continues texts as they stand, over the same session as `generator`."""
        self.generator, self.raw, self.states, self.settings = generator, raw, states, settings
        self.worker = Worker(settings.waiting)
        self.metrics = Metrics()
        self.last: Reply | None = None
        self._count = 0
        self._restored = 0  # conversations that `/metrics` has counted
        self.model = generator.session.artifact.manifest.name

    def number(self) -> str:
        """One that no other reply has, those of an earlier server included."""
        self._count += 1
        return f"{int(time.time())}_{self._count}"

    def finished(self, reply: Reply) -> None:
        """Count what a reply cost, whether or not somebody still waits for it."""
        self.last = reply
        m = self.metrics
        m.prompt.inc(reply.prompt_tokens)
        m.cached.inc(reply.reused_tokens)
        m.made.inc(len(reply.ids))
        m.passes.inc(reply.passes)
        m.drafted.inc(reply.drafted)
        m.accepted.inc(reply.accepted)
        m.ties.inc(reply.ties)
        m.first.observe(reply.first_token_seconds)
        m.seconds.observe(reply.seconds)

    def memory(self) -> dict[str, int]:
        """Resident bytes: rows of state, kept conversations included, other heap, mapped files."""
        session, held = self.generator.session, read_memory()
        anon = held.anon or 0
        state = min(anon, session.plan.touched(session.written) + self.states.ram)
        return {"state": state, "heap": anon - state, "mapped": (held.file or 0)}

    def status(self) -> dict[str, Any]:
        session, last = self.generator.session, self.last
        rate = 0.0
        if last and len(last.ids) > 1:
            rate = (len(last.ids) - 1) / max(1e-9, last.seconds - last.first_token_seconds)
        return {
            "version": __version__,
            "model": self.model,
            "engine": session.engine,
            "ctx": session.plan.ctx,
            "used": session.pos,
            "memory": self.memory(),
            "planned": self.settings.planned,
            "limit": self.settings.limit,
            "busy": self.worker.busy,
            "queued": self.worker.queued,
            "kept": {"count": self.states.count, "bytes": self.states.bytes},
            "last": {
                "tokens_per_second": rate,
                "first_token_seconds": last.first_token_seconds if last else 0.0,
                "prompt_tokens": last.prompt_tokens if last else 0,
                "reused_tokens": last.reused_tokens if last else 0,
            },
        }

    def prometheus(self) -> bytes:
        m, session = self.metrics, self.generator.session
        for kind, count in self.memory().items():
            m.memory.labels(kind).set(count)
        m.context.set(session.pos)
        m.queue.set(self.worker.queued)
        m.kept.set(self.states.count)
        m.kept_bytes.set(self.states.bytes)
        m.restored.inc(self.states.restored - self._restored)
        self._restored = self.states.restored
        return bytes(generate_latest(m.registry))

    def stop(self) -> None:
        """End the reply under way and keep the conversation."""
        self.worker.stop(_STOP_SECONDS)
        self.states.keep()


def make_app(server: Server) -> Starlette:
    """The HTTP application over a server; stopping it stops the server."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.stop)

    async def chat(request: Request) -> Response:
        asked = schema.parse(schema.ChatRequest, await _body(request, server.settings))
        begin = _replying(server, asked)
        answer = schema.Answer(
            server.number(), server.model, server.generator.tokenizer, chat=True,
            counts=asked.include_usage,
        )  # fmt: skip
        return await _answer(request, server, answer, begin, asked.stream)

    async def respond(request: Request) -> Response:
        asked = schema.parse(ResponsesRequest, await _body(request, server.settings))
        begin = _replying(server, asked)
        answer = ResponsesAnswer(server.number(), server.model, asked)
        return await _answer(request, server, answer, begin, asked.stream)

    async def complete(request: Request) -> Response:
        asked = schema.parse(schema.CompletionRequest, await _body(request, server.settings))
        text = asked.text(server.raw.tokenizer)
        options = asked.options(server.settings.max_tokens)

        def begin(cancelled: Callable[[], bool]) -> Turn:
            return server.raw.reply([Message("user", text)], options=options, cancelled=cancelled)

        answer = schema.Answer(
            server.number(), server.model, server.raw.tokenizer, chat=False,
            counts=asked.include_usage,
        )  # fmt: skip
        return await _answer(request, server, answer, begin, asked.stream)

    one = {"id": server.model, "object": "model", "created": 0, "owned_by": "edge-kv"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [one]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != server.model:
            message = f"This server has one model, {server.model!r}."
            return JSONResponse(schema.error(message, code="model_not_found"), 404)
        return JSONResponse(one)

    async def status(request: Request) -> Response:
        return JSONResponse(server.status())

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return Response(server.prometheus(), media_type="text/plain; version=0.0.4")

    async def static(request: Request) -> Response:
        name, kind = STATIC[request.scope["path"]]
        content = files("edge_kv.serve").joinpath("static", name).read_bytes()
        return Response(content, media_type=kind)

    async def failed(request: Request, e: Exception) -> Response:
        server.metrics.requests.labels("refused").inc()
        return _failure(e)

    async def left(request: Request, e: Exception) -> Response:
        server.metrics.requests.labels("disconnected").inc()
        return Response(status_code=499)

    async def broken(request: Request, e: Exception) -> Response:
        server.metrics.requests.labels("failed").inc()
        message = "The server failed on this request; its log says why."
        return JSONResponse(schema.error(message, "server_error"), 500)

    async def missing(request: Request, e: Exception) -> Response:
        status = getattr(e, "status_code", 404)
        what = "does not take" if status == 405 else "has nothing at"
        path = request.scope["path"][:100]
        message = f"This server {what} {request.method} {path!r}; it speaks OpenAI's API at /v1."
        code = "method_not_allowed" if status == 405 else "not_found"
        return JSONResponse(schema.error(message, code=code), status, getattr(e, "headers", None))

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/responses", respond, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/status", status),
        Route("/healthz", health),
        Route("/metrics", metrics),
        *(Route(path, static) for path in STATIC),
    ]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(_Guard, settings=server.settings)],
        exception_handlers={
            EdgeKVError: failed, ClientDisconnect: left, 404: missing, 405: missing,
            Exception: broken,
        },
    )  # fmt: skip


class _Guard:
    """What every request has to pass: host, origin, key; and the headers every answer carries."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        allowed = self._allowed_origin(request)

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = dict(_HEADERS)
                if allowed:
                    extra |= {"Access-Control-Allow-Origin": allowed, "Vary": "Origin"}
                given = [(k.lower().encode(), v.encode()) for k, v in extra.items()]
                message["headers"] = [*message.get("headers", []), *given]
            await send(message)

        refused = self._refusal(request, allowed)
        await (refused or self._app)(scope, receive, sending)

    def _refusal(self, request: Request, allowed: str) -> Response | None:
        settings = self._settings
        if request.method == "OPTIONS" and allowed:
            wanted = request.headers.get("access-control-request-headers", "")
            heard = {  # OpenAI's client for browsers sends headers of its own
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": wanted or "Authorization, Content-Type",
                "Access-Control-Max-Age": "600",
            }
            return Response(status_code=204, headers=heard)
        # A site whose name was made to point here must not reach a server that trusts its machine.
        host = request.headers.get("host", "")
        if settings.hosts and _name(host) not in settings.hosts:
            message = f"This server does not answer to the name {host!r}."
            return JSONResponse(schema.error(message), 403)
        origin = request.headers.get("origin")
        if origin and not allowed and origin != f"{request.scope['scheme']}://{host}":
            return JSONResponse(schema.error(f"Requests from {origin} are not allowed."), 403)
        if settings.api_key and request.scope["path"] not in _OPEN and not self._has_key(request):
            message = "This server wants its API key: send 'Authorization: Bearer KEY'."
            document = schema.error(message, "authentication_error", "invalid_api_key")
            return JSONResponse(document, 401, {"WWW-Authenticate": "Bearer"})
        return None

    def _has_key(self, request: Request) -> bool:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        # Header bytes are read as Latin-1, whatever a client means by them.
        right = hmac.compare_digest(
            given.strip().encode("latin-1"), self._settings.api_key.encode()
        )
        return right and kind.lower() == "bearer"

    def _allowed_origin(self, request: Request) -> str:
        origin, origins = request.headers.get("origin", ""), self._settings.origins
        return origin if origin and (origin in origins or "*" in origins) else ""


def _name(host: str) -> str:
    """The name in a Host header, without its port; empty where it is none."""
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]).lower() if found else ""


async def _body(request: Request, settings: Settings) -> bytes:
    """The body of a JSON request.

    Raises:
        RuntimeFault: it is larger than the server takes, or not declared as JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RuntimeFault(f"Send JSON (Content-Type: application/json), not {kind or 'nothing'}.")
    parts, held = [], 0
    async for part in request.stream():
        held += len(part)
        if held > settings.body:
            raise _TooLarge(f"The request is larger than the {settings.body} bytes taken here.")
        parts.append(part)
    return b"".join(parts)


class _TooLarge(RuntimeFault):
    """A request body above the limit."""


class _Waiting:
    """The events of one job, as they reach the event loop."""

    def __init__(self, request: Request, server: Server, begin: Begin) -> None:
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Piece | Reply | Exception] = asyncio.Queue()
        self._request, self._server = request, server
        self._look = 0.0  # when to look again whether the client is still there

        def told(event: Piece | Reply | Exception) -> None:
            if isinstance(event, Reply):
                server.finished(event)
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        # Many can share one key, and clients of one machine may each send a key of their own.
        host = request.client.host if request.client else ""
        client = f"{host} {request.headers.get('authorization', '')}"
        self._job = Job(client, begin, told, time.monotonic() + server.settings.timeout)
        server.worker.submit(self._job)

    async def events(self) -> AsyncGenerator[Piece | Reply, None]:
        """Pieces, then the reply. Cancels the job when the client has gone.

        Raises:
            EdgeKVError: the reply failed. ClientDisconnect: nobody waits for it.
        """
        requests, ended = self._server.metrics.requests, False
        try:
            while not ended:
                event = await self._next()
                ended = not isinstance(event, Piece)
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Reply):
                    requests.labels("cancelled" if event.finish == CANCELLED else "answered").inc()
                yield event
        finally:
            self._job.cancelled.set()
            if not ended:
                requests.labels("disconnected").inc()

    async def _next(self) -> Piece | Reply | Exception:
        while True:
            if time.monotonic() >= self._look:  # also while one event follows another
                self._look = time.monotonic() + _POLL_SECONDS
                if await self._request.is_disconnected():
                    raise ClientDisconnect
            with suppress(TimeoutError):
                return await asyncio.wait_for(self._events.get(), _POLL_SECONDS)


def _replying(server: Server, asked: schema.ChatRequest | ResponsesRequest) -> Begin:
    """What begins the reply to a conversation.

    Raises:
        PromptError: the request holds something that cannot be served.
    """
    messages, tools, grammar = asked.conversation(), asked.offered(), asked.grammar()
    options = asked.options(server.settings.max_tokens)
    choice = "required" if asked.must_call else "auto"

    def begin(cancelled: Callable[[], bool]) -> Turn:
        return server.generator.reply(
            messages,
            tools=tools,
            options=options,
            grammar=grammar,
            tool_choice=choice,
            cancelled=cancelled,
        )

    return begin


async def _answer(
    request: Request,
    server: Server,
    answer: schema.Answer | ResponsesAnswer,
    begin: Begin,
    streams: bool,
) -> Response:
    waiting = _Waiting(request, server, begin)
    events = waiting.events()
    try:
        first = await anext(events)  # what is wrong with a request is told before a stream begins
        while not streams:
            if isinstance(first, Reply):
                return JSONResponse(answer.whole(first))
            first = await anext(events)
    except ClientDisconnect:
        return Response(status_code=499)

    async def lines() -> AsyncIterator[bytes]:
        event: Piece | Reply = first
        yield _lines(answer.opening())
        try:
            while not isinstance(event, Reply):
                yield _lines(answer.part(event))
                event = await anext(events)
            yield _lines(answer.closing(event))
        except EdgeKVError as e:
            server.metrics.requests.labels("failed").inc()
            yield _lines(answer.broken(_document(e)))
        except ClientDisconnect:
            return
        yield answer.ends.encode()

    async def closing() -> AsyncIterator[bytes]:
        try:
            async for line in lines():
                if line:
                    yield line
        finally:
            await events.aclose()

    unbuffered = {"X-Accel-Buffering": "no"}  # by a proxy before it
    return StreamingResponse(closing(), headers=unbuffered, media_type="text/event-stream")


def _lines(documents: list[dict[str, Any]]) -> bytes:
    """Documents as events of a stream, which bear a name where their documents have a type."""
    names = (f"event: {d['type']}\n" if "type" in d else "" for d in documents)
    texts = (f"data: {json.dumps(d, ensure_ascii=False)}\n\n" for d in documents)
    return "".join(map(str.__add__, names, texts)).encode()


def _document(e: Exception) -> dict[str, Any]:
    if isinstance(e, ContextFullError):
        return schema.error(str(e), code="context_length_exceeded")
    kind = "server_error" if isinstance(e, (QueueFull, MemoryLimitError, TimeIsUp)) else None
    return schema.error(str(e), kind or "invalid_request_error")


def _failure(e: Exception) -> Response:
    """The answer to a request that failed with an error of ours."""
    statuses: list[tuple[type[Exception], int]] = [
        (_TooLarge, 413),
        (QueueFull, 429),
        (MemoryLimitError, 503),
        (TimeIsUp, 504),
    ]
    status = next((s for kind, s in statuses if isinstance(e, kind)), 400)
    return JSONResponse(_document(e), status, {"Retry-After": "5"} if status == 429 else None)


def serve(server: Server, host: str, port: int, *, ready: Callable[[str], None]) -> None:
    """Answer requests until SIGINT, SIGTERM or SIGHUP; `ready` hears the address once it is bound.

    Raises:
        RuntimeFault: the address cannot be bound.
    """
    import uvicorn

    from edge_kv.serve.connection import Connection, Listener

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, port), family=family)
    except (OSError, TypeError, UnicodeError) as e:  # the latter two: a name that is none
        why = e.strerror if isinstance(e, OSError) else e
        raise RuntimeFault(
            f"Cannot listen on {host}:{port} ({why}); choose another --port or --host."
        ) from e
    with bound:
        name = f"[{host}]" if family == socket.AF_INET6 else host
        ready(f"http://{name}:{bound.getsockname()[1]}")
        config = uvicorn.Config(
            make_app(server), log_level="warning", access_log=False, server_header=False,
            timeout_graceful_shutdown=int(_STOP_SECONDS), h11_max_incomplete_event_size=64 << 10,
            http=Connection, ws="none",
        )  # fmt: skip
        running = Listener(config, server.worker.end)
        with hang_up(running.handle_exit):
            running.run(sockets=[bound])
