"""The gateway on a port: uvicorn on a thread of its own, so that whoever starts it keeps the main one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable

import uvicorn

from stillhouse.engine.errors import StillhouseError
from stillhouse.gateway.address import bound, reachable
from stillhouse.gateway.app import create_app
from stillhouse.gateway.connection import Connection
from stillhouse.gateway.gateway import Access, Gateway
from stillhouse.gateway.generator import Generator
from stillhouse.gateway.memory import give_memory_back

log = logging.getLogger(__name__)

# Longer than what proxies and clients keep connections for, so that they close them and not we under their hands.
_KEEP_ALIVE_S = 620
_BACKLOG = 2048
_HEAD_BYTES = 2**16
_LAST_WORDS_S = 1.0  # for the errors of those that are cut at the end


class GatewayServer:
    """Listens from `start` on; answers 503 until something is plugged in, and again from `drain` on."""

    def __init__(self, host: str, port: int, access: Access | None = None) -> None:
        """Binds the port (0: any free one). Raises UsageError or StillhouseError where that cannot be."""
        self._socket = bound(host, port)
        self.gateway = Gateway(access)
        self.port = int(self._socket.getsockname()[1])
        self.url = f"http://{reachable(host)}:{self.port}"
        config = uvicorn.Config(
            create_app(self.gateway),
            log_config=None,
            log_level="error",  # a line for every request that is no HTTP would be what its sender wants
            access_log=False,
            lifespan="off",
            ws="none",
            # It bounds the size of a request's head, which uvicorn's other parser does not.
            http=Connection,
            h11_max_incomplete_event_size=_HEAD_BYTES,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
            backlog=_BACKLOG,
        )
        self._server = uvicorn.Server(config)
        self._loop = asyncio.new_event_loop()
        self._closing: asyncio.Future[None] | None = None
        self._thread = threading.Thread(target=self._run, name="stillhouse-gateway", daemon=True)

    def start(self) -> None:
        """Begins to listen, and returns when it does."""
        give_memory_back()
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise StillhouseError(f"the gateway could not listen on {self.url}")
            time.sleep(0.005)

    def plug(self, opened: Callable[[], Awaitable[Generator]]) -> None:
        """Awaits `opened()` on the gateway's loop; what it returns answers from then on. Raises what it raises."""

        async def plug() -> None:
            self.gateway.generator = await opened()

        asyncio.run_coroutine_threadsafe(plug(), self._loop).result()

    def refuse(self) -> None:
        """Answers new requests with 503 from now on; those that run go on."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(setattr, self.gateway, "draining", True)

    def drain(self, grace_s: float, *, hurry: threading.Event | None = None) -> None:
        """Refuses new requests at once, waits up to `grace_s` for those that run (`hurry` cuts it short), and ends.

        Whoever still waits then gets an error by name, as an event where the answer has begun.
        """
        if not self._thread.is_alive():
            self._socket.close()
            return
        self.refuse()
        time.sleep(0.05)  # until the flag is set and whoever was let in before it is counted
        self._wait_for_requests(grace_s - 0.05, hurry)
        if self.gateway.in_flight:
            self._loop.call_soon_threadsafe(self._close_generator)
            self._wait_for_requests(_LAST_WORDS_S, None)
        self._server.should_exit = True
        self._thread.join(timeout=10)

    def _wait_for_requests(self, most_s: float, hurry: threading.Event | None) -> None:
        deadline = time.monotonic() + most_s
        while self.gateway.in_flight and time.monotonic() < deadline and not (hurry and hurry.is_set()):
            time.sleep(0.02)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            self._close_generator()
            if self._closing is not None:
                await self._closing

    def _close_generator(self) -> None:
        """Begins to close what answers; on the loop, once."""
        if self._closing is None and self.gateway.generator is not None:
            self._closing = asyncio.ensure_future(self.gateway.generator.close())
