"""Connections that are not held open by who says nothing, or takes nothing.

uvicorn waits for ever for the rest of a request and for a client to read what it was sent. Here a
client has a time for each: to send a request whole, and to make room in its buffers.
"""

from __future__ import annotations

import asyncio

import h11
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
