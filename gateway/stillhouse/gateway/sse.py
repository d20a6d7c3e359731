"""Server-sent events: OpenAI's stream of JSON objects, ended by [DONE]; closed connections cancel what they asked."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stillhouse.gateway.answers import unless_gone
from stillhouse.gateway.errors import api_error

log = logging.getLogger(__name__)

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
DONE = b"data: [DONE]\n\n"
# nginx would hold the events back; caches have no business here.
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def event(value: Any) -> bytes:
    """One event with a JSON object."""
    return b"data: " + _ENCODER.encode(value).encode() + b"\n\n"


class EventStream(Response):
    """Sends the events as they come, then [DONE]; an error on the way is an event too, in OpenAI's shape."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self._events = events
        self.status_code = 200
        self.background = None
        self.raw_headers = list(_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        # A connection that closes while it is written to is one that nobody reads.
        with contextlib.suppress(OSError):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with contextlib.aclosing(self._events) as events:
                try:
                    async for data in events:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                except OSError:
                    raise
                except Exception as error:
                    fault = api_error(error)
                    if fault.status == 500:
                        log.exception("a stream failed")
                    await send(
                        {"type": "http.response.body", "body": b"data: " + fault.body() + b"\n\n", "more_body": True}
                    )
            await send({"type": "http.response.body", "body": DONE, "more_body": False})
