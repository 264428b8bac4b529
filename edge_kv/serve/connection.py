"""Connections that are not held open by who says nothing, or takes nothing, and their end.

uvicorn waits for ever for the rest of a request and for a client to read what it was sent. Here a
client has a time for each: to send a request whole, and to make room in its buffers. When a signal
ends the server, uvicorn lets replies go on and raises the signal once more; here they end at once.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """One client's connection.

    `REQUEST_SECONDS` is what a request may take from its first byte (or from connecting) to the end
    of its body, `STALL_SECONDS` what a client may leave unread what it was sent, `MOST` how many
    connections are open at a time: those beyond are closed at once.
    """

    REQUEST_SECONDS = 60.0
    STALL_SECONDS = 60.0
    MOST = 512

    _asking: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.MOST:
            transport.abort()
        else:
            self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._asking, self._stalled):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._expect_request()  # its first bytes
        super().data_received(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.STALL_SECONDS, self._drop)

    def resume_writing(self) -> None:
        if self._stalled:
            self._stalled.cancel()
        super().resume_writing()

    def _expect_request(self) -> None:
        if self._asking:
            self._asking.cancel()
        self._asking = self.loop.call_later(self.REQUEST_SECONDS, self._end_of_patience)

    def _end_of_patience(self) -> None:
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._drop()

    def _drop(self) -> None:
        self.transport.abort()


class Listener(uvicorn.Server):
    """A server until a signal comes: asked to stop, it stops, which is no failure of the command.

    A second SIGINT waits for nobody.
    """

    def __init__(self, config: uvicorn.Config, ending: Callable[[], None]) -> None:
        """`ending` has to make replies under way end soon."""
        super().__init__(config)
        self._ending = ending

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ending()
        await super().shutdown(sockets)
