"""The transport of `AsyncClient` over HTTP, on aiohttp (which tritonclient brings)."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque

import aiohttp

from stillhouse.client import http_wire
from stillhouse.client.address import Address
from stillhouse.client.errors import ClientError, StreamBroken
from stillhouse.client.types import ModelEntry, Reply, Request


class HttpTransport:
    """A pool of connections to one server; made inside the event loop that uses it."""

    def __init__(self, address: Address, connect_timeout_s: float) -> None:
        self._authority = address.authority
        self._base_url = address.base_url
        self._connect_timeout_s = connect_timeout_s
        timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout_s)
        self._answering = weakref.WeakSet[aiohttp.ClientResponse]()
        # No limit on open connections: a hundred open streams are a hundred connections.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=timeout, headers=http_wire.HEADERS
        )

    async def open(self, request: Request) -> HttpStream:
        return HttpStream(self, request)

    async def models(self) -> list[ModelEntry]:
        status, body = await self._ask("POST", http_wire.INDEX_PATH)
        if status != 200:
            raise http_wire.read_error(status, body, self._authority)
        return http_wire.read_index(body, self._authority)

    async def ready(self, model: str, version: str) -> bool:
        return (await self._ask("GET", http_wire.ready_path(model, version)))[0] == 200

    async def close(self) -> None:
        # aiohttp closes the connections without a word to who reads from one.
        for response in self._answering:
            response.content.set_exception(aiohttp.ClientConnectionError("the connection was closed"))
        await self._session.close()

    async def _ask(self, method: str, path: str) -> tuple[int, bytes]:
        limit = aiohttp.ClientTimeout(total=self._connect_timeout_s)
        try:
            async with self._session.request(method, self._base_url + path, timeout=limit) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise self.failure(error) from None

    async def post(self, request: Request) -> aiohttp.ClientResponse:
        """Sends the request and waits for the head of the answer."""
        url = self._base_url + http_wire.generate_path(request)
        response = await self._session.post(url, data=http_wire.write_body(request))
        self._answering.add(response)
        return response

    def failure(self, error: Exception) -> ClientError:
        if isinstance(error, asyncio.TimeoutError):
            return http_wire.cannot_reach(self._authority, f"no connection in {self._connect_timeout_s:g} s")
        return http_wire.cannot_reach(self._authority, error)


class HttpStream:
    """The replies of one request; sent when the first is asked for."""

    def __init__(self, transport: HttpTransport, request: Request) -> None:
        self._transport = transport
        self._request = request
        self._response: aiohttp.ClientResponse | None = None
        self._events = http_wire.EventReader()
        self._replies: deque[Reply] = deque()
        self._done = False

    async def next(self, wait_s: float | None) -> Reply | None:
        """The next reply; None at the end. Raises TimeoutError after `wait_s`, ClientError where it broke."""
        try:
            return await asyncio.wait_for(self._next(), wait_s)
        except asyncio.TimeoutError:
            raise TimeoutError from None

    async def close(self) -> None:
        """Closes the connection of what still runs, which cancels it on the server; else gives it back."""
        if self._response is None:
            return
        if self._done:
            self._response.release()
        else:
            self._response.close()

    async def _next(self) -> Reply | None:
        try:
            if self._response is None:
                self._response = await self._transport.post(self._request)
                if self._response.status != 200:
                    body = await self._response.read()
                    raise http_wire.read_error(self._response.status, body, self._request.model)
            while not self._replies and not self._done:
                await self._read(self._response)
        except aiohttp.ServerTimeoutError as error:
            raise self._transport.failure(error) from None
        except aiohttp.ClientPayloadError as error:
            raise StreamBroken(f"{self._request.model}: the connection broke off ({error})") from None
        except aiohttp.ClientError as error:
            raise self._transport.failure(error) from None
        return self._replies.popleft() if self._replies else None

    async def _read(self, response: aiohttp.ClientResponse) -> None:
        if not self._request.stream:
            body = await response.read()
            self._done = True
            self._replies.append(http_wire.read_reply(body, self._request))
            return
        piece = await response.content.readany()
        if not piece:
            self._done = True
            return
        for data in self._events.feed(piece):
            self._replies.append(http_wire.read_reply(data, self._request))
