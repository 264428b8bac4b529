"""Connections over real sockets: who sends nothing, or reads nothing, is let go of."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn
from fake_artifact import NumpySession
from test_serve import ASK, CHAT, artifact, serving  # noqa: F401

from edge_kv.serve.app import Settings, make_app
from edge_kv.serve.command import make_server
from edge_kv.serve.connection import Connection, Listener

PART, PARTS = bytes(1 << 16), 1000
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Impatient(Connection):
    REQUEST_SECONDS = 0.4
    STALL_SECONDS = 0.4
    MOST = 8


@contextmanager
def listening(app):
    """The port where `app` answers."""
    bound = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(
        uvicorn.Config(app, log_level="error", http=Impatient, ws="none", lifespan="off")
    )
    thread = threading.Thread(target=running.run, args=([bound],))
    thread.start()
    try:
        yield bound.getsockname()[1]
    finally:
        running.should_exit = running.force_exit = True
        thread.join(10)
        bound.close()


@pytest.fixture(scope="module")
def port(artifact):  # noqa: F811
    with listening(make_app(serving(artifact, None))) as port:
        yield port


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def said(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    try:
        while part := client.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def answered(port: int) -> bool:
    with connected(port) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return said(client).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "sent", ["", "GET / HT", f"{HEAD}X-Long: a", f"{HEAD}Content-Length: 50\r\n\r\n{{"]
)
def test_a_request_that_never_ends_is_dropped(port, sent):
    began = time.monotonic()
    with connected(port) as client:
        client.sendall(sent.encode())
        assert said(client) == b""
    assert 0.2 < time.monotonic() - began < 5
    assert answered(port)


def test_bytes_that_come_one_by_one_gain_no_time(port):
    began = time.monotonic()
    with connected(port) as client, pytest.raises(OSError):
        client.sendall(f"{HEAD}Content-Length: 1000\r\n\r\n".encode())
        while time.monotonic() - began < 5:
            client.sendall(b" ")
            time.sleep(0.05)
    assert time.monotonic() - began < 3


def test_a_second_request_on_a_connection_has_its_own_time(port):
    with connected(port) as client:
        for _ in range(3):
            time.sleep(0.25)
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}") and (part := client.recv(65536)):
                answer += part
            assert answer.startswith(b"HTTP/1.1 200")


def test_a_client_that_stops_reading_is_dropped():
    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(PARTS):
            await send({"type": "http.response.body", "body": PART, "more_body": True})

    with listening(endless) as port, connected(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(1.5)
        assert len(said(client)) < PARTS * len(PART)


def test_connections_beyond_the_most_are_closed_at_once(port):
    held = [connected(port) for _ in range(20)]
    began = time.monotonic()
    closed = [client for client in held[10:] if said(client) == b""]
    assert len(closed) == 10 and time.monotonic() - began < 5
    for client in held:
        client.close()
    time.sleep(0.1)
    assert answered(port)


@pytest.mark.parametrize("size", ["ZZ", "-1", "5\r\nabc", "FFFFFFFFFFFFFFFFFFFFFF"])
def test_chunks_of_wrong_lengths_are_refused(port, size):
    with connected(port) as client:
        client.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n{size}\r\nx\r\n0\r\n\r\n".encode())
        client.shutdown(socket.SHUT_WR)
        assert b" 200 " not in said(client)[:20]
    assert answered(port)


@pytest.fixture
def slow(artifact, monkeypatch):  # noqa: F811
    """A server whose replies of 500 tokens take ten seconds, and the bytes that ask for one."""

    def slowly(session, ids, pos):
        time.sleep(0.02)
        return decode(session, ids, pos)

    decode = NumpySession._run_decode
    monkeypatch.setattr(NumpySession, "_run_decode", slowly)

    def request(**more):
        body = json.dumps({**ASK, "max_tokens": 500, "temperature": 0, **more})
        return f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode()

    return make_server(NumpySession(artifact), Settings(), drafts="off"), request


def test_a_reply_in_one_document_ends_when_its_client_has_gone(slow):
    server, request = slow
    with listening(make_app(server)) as port:
        with connected(port) as client:
            client.sendall(request())
            while not server.worker.busy:
                time.sleep(0.01)
        until = time.monotonic() + 4
        while server.worker.busy:
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_replies_and_the_server_and_is_no_failure(slow, number):
    server, request = slow
    config = uvicorn.Config(make_app(server), log_level="error", http=Connection, ws="none")
    running = Listener(config, server.worker.end)
    heard = []

    def ask():
        with connected(bound.getsockname()[1]) as client:
            client.sendall(request(stream=True))
            heard.append(client.recv(1))
            signal.raise_signal(number)  # Python lets its main thread, the server's, hear it
            heard.append(said(client))

    with socket.create_server(("127.0.0.1", 0)) as bound:
        asking = threading.Thread(target=ask)
        asking.start()
        began = time.monotonic()
        running.run([bound])  # which would raise the signal again
        asking.join()
    assert heard[1].count(b"data: ") < 400 and time.monotonic() - began < 8
    assert b'"finish_reason": "length"' in heard[1] and b"data: [DONE]" in heard[1]
