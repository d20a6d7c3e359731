"""A client's connection: uvicorn's HTTP/1.1, and an end to whoever never says what they want."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from stillhouse.gateway.errors import invalid

HEAD_TIMEOUT_S = 30.0


class Connection(H11Protocol):
    """Closes a connection whose request has no whole head `HEAD_TIMEOUT_S` after it was opened or after its first byte.

    uvicorn itself waits for ever, so that a few thousand silent connections take every descriptor. Between requests
    its keep-alive time holds; how long a body may take is for the reader of bodies to say. The rest of a body that was
    answered before it had come (401, or a GET with one) has as long as a head.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Any byte has ended uvicorn's keep-alive time, and only the end of an answer begins it again.
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 (uvicorn's words say no more)
        """Answers what is no HTTP in the shape of every error; where an answer has begun, nothing fits any more."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            most = self.config.h11_max_incomplete_event_size
            error = invalid(f"this is no request of HTTP/1.1, or its head is larger than {most} bytes")
            body = error.body()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            for event in (
                h11.Response(status_code=error.status, headers=headers, reason="Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
