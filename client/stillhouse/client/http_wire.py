"""Triton's HTTP paths, bodies and server-sent events. Shared by both HTTP transports.

`/generate_stream` answers in server-sent events (WHATWG HTML, section 9.2) without an end marker: the answer is whole
when its finish reason came, or when the body ended as HTTP says it should.
"""

from __future__ import annotations

import contextlib
import html
import json
import re
import time
from typing import Any
from urllib.parse import quote

from stillhouse.client.errors import (
    ClientError,
    ConnectionFailed,
    ModelNotFound,
    RequestRejected,
    Unavailable,
    from_server,
)
from stillhouse.client.request import reply_from
from stillhouse.client.types import ModelEntry, Reply, Request

HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
INDEX_PATH = "/v2/repository/index"

# A page's tags, and what between them is not to be read.
_TAGS = re.compile(r"<(style|script)\b.*?</\1\s*>|<[^>]*>", re.DOTALL | re.IGNORECASE)


def generate_path(request: Request) -> str:
    return _model_path(request.model, request.version) + ("/generate_stream" if request.stream else "/generate")


def ready_path(model: str, version: str) -> str:
    return _model_path(model, version) + "/ready" if model else "/v2/health/ready"


def _model_path(model: str, version: str) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def write_body(request: Request) -> bytes:
    return json.dumps(dict(request.inputs), ensure_ascii=False).encode()


class EventReader:
    """Cuts a body that comes in pieces into the data of its server-sent events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events = []
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


def read_reply(data: bytes, request: Request) -> Reply:
    """The reply in one event's data, or in the body of /generate. Raises ClientError where it is an error."""
    received_s = time.perf_counter()
    try:
        values = json.loads(data)
    except ValueError:
        raise _not_triton(f"{request.model}: the answer is not JSON: {data[:80]!r}") from None
    if not isinstance(values, dict):
        raise _not_triton(f"{request.model}: the answer is not a JSON object: {data[:80]!r}")
    if "error" in values:
        raise from_server(str(values["error"]), request.model)
    try:
        reply = reply_from(values, received_s)
    except (ValueError, LookupError, TypeError) as error:
        raise _not_triton(f"{request.model}: the answer's details cannot be read: {error!r}") from None
    counts = (reply.num_input_tokens, reply.num_output_tokens)
    if not isinstance(reply.text, str) or not all(count is None or isinstance(count, int) for count in counts):
        raise _not_triton(f"{request.model}: the answer's text is no text, or its counts no numbers: {data[:80]!r}")
    return reply


def read_index(body: bytes, authority: str) -> list[ModelEntry]:
    try:
        entries = json.loads(body)
        return [ModelEntry(e["name"], e.get("version", ""), e.get("state", ""), e.get("reason", "")) for e in entries]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _not_triton(f"{authority}: the repository index is not Triton's: {body[:80]!r}") from None


def read_error(status: int, body: bytes, where: str) -> ClientError:
    """The client's error for an HTTP status that is no success."""
    said: Any = None
    # Triton's /generate_stream wraps its error in an event too.
    body = body.removeprefix(b"data:").strip()
    with contextlib.suppress(ValueError):  # where it is no JSON, its text is shown as it is
        said = json.loads(body)
    message = said["error"] if isinstance(said, dict) and "error" in said else None
    if message is None:
        text = first_line(body)
        message = f"HTTP status {status}" + (f": {text}" if text else "")
        if status == 404:
            return _not_triton(f"{where}: {message}")
    default = Unavailable if status >= 500 else ModelNotFound if status == 404 else RequestRejected
    return from_server(str(message), where, default)


def first_line(body: bytes) -> str:
    """The first line that says something, of a text or of a web page, which proxies and small servers refuse with."""
    text = body[:4000].decode("utf-8", errors="replace")
    if text.lstrip().startswith("<"):
        text = html.unescape(_TAGS.sub("", text))
    return next((line.strip()[:200] for line in text.splitlines() if line.strip()), "")


def cannot_reach(authority: str, reason: object) -> ConnectionFailed:
    return ConnectionFailed(
        f"cannot reach {authority}: {reason}",
        hint="is the server started, and is this its HTTP port (8000 by default)?",
    )


def _not_triton(message: str) -> RequestRejected:
    return RequestRejected(message, hint="is this a Triton server's HTTP port (8000 by default)?")
