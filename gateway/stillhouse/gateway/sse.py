"""Server-sent events: OpenAI's stream of JSON objects, ended by [DONE]; closed connections cancel what they asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stillhouse.gateway.answers import unless_gone
from stillhouse.gateway.errors import api_error

log = logging.getLogger(__name__)

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
DONE = b"data: [DONE]\n\n"
# Proxies cut what is silent for a minute, and a request may wait longer than that for a slot: a comment, which clients
# skip, keeps it open.
SILENT_S = 15.0
_COMMENT = b": keep-alive\n\n"
# nginx would hold the events back; caches have no business here.
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def event(value: Any) -> bytes:
    """One event with a JSON object."""
    return b"data: " + _ENCODER.encode(value).encode() + b"\n\n"


async def stream_response(receive: Receive, events: AsyncGenerator[bytes, None]) -> Response:
    """The events as they come. Waits a while for the first one: what fails before it has a status of its own.

    `receive` is the ASGI channel of a request whose body has been read; a client that has gone cancels the events.
    """
    first = asyncio.ensure_future(events.__anext__())
    try:
        waited = await unless_gone(receive, asyncio.wait({first}, timeout=SILENT_S))
        if first.done():
            first.result()
        if waited is not None:
            return EventStream(first, events)
    except BaseException:
        await _close(first, events)
        raise
    await _close(first, events)
    return Response(status_code=499)


class EventStream(Response):
    """Sends the events as they come, then [DONE]; an error on the way is an event too, in OpenAI's shape.

    `first` is the first of them, which may be still to come. Where none comes for `SILENT_S`, or up to twice that, a
    comment does.
    """

    def __init__(self, first: asyncio.Future[bytes], events: AsyncGenerator[bytes, None]) -> None:
        self._first = first
        self._events = events
        self._sent = 0
        self.status_code = 200
        self.background = None
        self.raw_headers = list(_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await unless_gone(receive, self._send(send))
        finally:
            await _close(self._first, self._events)

    async def _send(self, send: Send) -> None:
        # A connection that closes while it is written to is one that nobody reads.
        with contextlib.suppress(OSError):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with self._commenting(send):
                try:
                    await self._send_event(send, await self._first)
                    async for data in self._events:
                        await self._send_event(send, data)
                except OSError:
                    raise
                except Exception as error:
                    fault = api_error(error)
                    if fault.status == 500:
                        log.exception("a stream failed")
                    await self._send_event(send, b"data: " + fault.body() + b"\n\n")
            await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _send_event(self, send: Send, data: bytes) -> None:
        self._sent += 1
        await send({"type": "http.response.body", "body": data, "more_body": True})

    @contextlib.asynccontextmanager
    async def _commenting(self, send: Send) -> AsyncIterator[None]:
        """Sends comments while nothing else is sent: on a task of its own, for a limit to each wait would cost more."""

        async def comment() -> None:
            while True:
                sent = self._sent
                await asyncio.sleep(SILENT_S)
                if sent == self._sent:
                    await send({"type": "http.response.body", "body": _COMMENT, "more_body": True})

        commenting = asyncio.create_task(comment())
        try:
            yield
        finally:
            commenting.cancel()
            await asyncio.gather(commenting, return_exceptions=True)


async def _close(first: asyncio.Future[bytes], rest: AsyncGenerator[bytes, None]) -> None:
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await rest.aclose()
