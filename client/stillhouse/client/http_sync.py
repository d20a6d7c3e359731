"""The transport of `Client` over HTTP, on urllib3 (which tritonclient brings)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    IncompleteRead,
    InvalidChunkLength,
    NewConnectionError,
    ReadTimeoutError,
)

from stillhouse.client import http_wire
from stillhouse.client.address import Address
from stillhouse.client.errors import ClientError, StreamBroken
from stillhouse.client.types import ModelEntry, Reply, Request

_IDLE_CONNECTIONS = 128  # kept open for reuse; more may be open at a time
_SHORTEST_S = 0.001  # a time-out of 0 would mean "do not block", not "no time left"


class HttpTransport:
    """A pool of connections to one server. Threads may share it."""

    def __init__(self, address: Address, connect_timeout_s: float) -> None:
        self._authority = address.authority
        self._base_url = address.base_url
        self._connect_timeout_s = connect_timeout_s
        self._pool = urllib3.PoolManager(maxsize=_IDLE_CONNECTIONS, retries=False)

    def open(self, request: Request) -> HttpStream:
        return HttpStream(self, request)

    def models(self) -> list[ModelEntry]:
        status, body = self._ask("POST", http_wire.INDEX_PATH)
        if status != 200:
            raise http_wire.read_error(status, body, self._authority)
        return http_wire.read_index(body, self._authority)

    def ready(self, model: str, version: str) -> bool:
        return self._ask("GET", http_wire.ready_path(model, version))[0] == 200

    def close(self) -> None:
        self._pool.clear()

    def _ask(self, method: str, path: str) -> tuple[int, bytes]:
        try:
            response = self._pool.request(method, self._base_url + path, timeout=self._connect_timeout_s)
            return response.status, response.data
        except HTTPError as error:
            raise self.failure(error) from None

    def post(self, request: Request, wait_s: float | None) -> urllib3.BaseHTTPResponse:
        """Sends the request and waits for the head of the answer, at most `wait_s`."""
        if wait_s is not None:
            wait_s = max(wait_s, _SHORTEST_S)
        connect_s = self._connect_timeout_s if wait_s is None else min(self._connect_timeout_s, wait_s)
        return self._pool.request(
            "POST",
            self._base_url + http_wire.generate_path(request),
            body=http_wire.write_body(request),
            headers=http_wire.HEADERS,
            timeout=urllib3.Timeout(connect=connect_s, read=wait_s),
            preload_content=False,
        )

    def failure(self, error: HTTPError) -> ClientError:
        if isinstance(error, NewConnectionError):
            return http_wire.cannot_reach(self._authority, error.__cause__ or error)
        if isinstance(error, ConnectTimeoutError):
            return http_wire.cannot_reach(self._authority, f"no connection in {self._connect_timeout_s:g} s")
        return http_wire.cannot_reach(self._authority, error)


class HttpStream:
    """The replies of one request; sent when the first is asked for."""

    def __init__(self, transport: HttpTransport, request: Request) -> None:
        self._transport = transport
        self._request = request
        self._response: urllib3.BaseHTTPResponse | None = None
        self._pieces: Iterator[bytes] = iter(())
        self._events = http_wire.EventReader()
        self._replies: deque[Reply] = deque()
        self._done = False

    def next(self, wait_s: float | None) -> Reply | None:
        """The next reply; None at the end. Raises TimeoutError after `wait_s`, ClientError where it broke."""
        try:
            if self._response is None:
                self._response = self._transport.post(self._request, wait_s)
                self._begin(self._response)
            while not self._replies and not self._done:
                limit_wait(self._response, wait_s)
                self._read()
        except ReadTimeoutError:
            raise TimeoutError from None
        except (IncompleteRead, InvalidChunkLength) as error:
            raise StreamBroken(f"{self._request.model}: the connection broke off ({error})") from None
        except HTTPError as error:
            raise self._transport.failure(error) from None
        return self._replies.popleft() if self._replies else None

    def close(self) -> None:
        """Closes the connection of what still runs, which cancels it on the server; else gives it back."""
        if self._response is None:
            return
        if self._done:
            self._response.release_conn()
        else:
            self._response.close()

    def _begin(self, response: urllib3.BaseHTTPResponse) -> None:
        if response.status != 200:
            body = response.read()
            self._done = True
            raise http_wire.read_error(response.status, body, self._request.model)
        chunked = isinstance(response, urllib3.HTTPResponse) and response.chunked
        self._pieces = response.read_chunked() if chunked else iter(lambda: response.read1(1 << 16), b"")

    def _read(self) -> None:
        if not self._request.stream:
            body = b"".join(self._pieces)
            self._done = True
            self._replies.append(http_wire.read_reply(body, self._request))
            return
        piece = next(self._pieces, None)
        if piece is None:
            self._done = True
            return
        for data in self._events.feed(piece):
            self._replies.append(http_wire.read_reply(data, self._request))


def limit_wait(response: urllib3.BaseHTTPResponse, wait_s: float | None) -> None:
    """Lets the next read of an answer's body take `wait_s` at most; urllib3 has a limit for the whole request alone."""
    sock = getattr(response.connection, "sock", None)
    if sock is None:
        # The server will close the connection (HTTP/1.0, Connection: close), so it has let go of its socket: the file
        # that the answer is read from still holds it.
        file = getattr(getattr(response, "_fp", None), "fp", None)
        sock = getattr(getattr(file, "raw", None), "_sock", None)
    if sock is not None:
        sock.settimeout(wait_s if wait_s is None else max(wait_s, _SHORTEST_S))
