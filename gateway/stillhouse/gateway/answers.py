"""Several answers at once, mixed as they come; each is cancelled when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from stillhouse.engine.answer import Chunk
from stillhouse.engine.errors import EngineClosed

_BUFFERED = 256

T = TypeVar("T")
Stream = AsyncGenerator[Chunk, None]


async def merged(streams: Sequence[Callable[[], Stream]], together: int) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The chunks of all streams, each with its stream's number; `together` of them run at a time.

    The first error ends all, and is raised.
    """
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]()) as only:
            async for chunk in only:
                yield 0, _sound(chunk)
        return
    queue: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue(_BUFFERED)
    gate = asyncio.Semaphore(together)
    tasks = [asyncio.create_task(_pump(number, stream, queue, gate)) for number, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            number, item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield number, _sound(item)
    finally:
        await _end(tasks)


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T | None:
    """The result of `work`; None, and `work` cancelled, when the client closes its connection before.

    `receive` is the ASGI channel of a request whose body has been read.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return worker.result() if worker.done() else None
    finally:
        await _end([worker, watcher])


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _pump(
    number: int,
    stream: Callable[[], Stream],
    queue: asyncio.Queue[tuple[int, Chunk | Exception | None]],
    gate: asyncio.Semaphore,
) -> None:
    try:
        async with gate, contextlib.aclosing(stream()) as chunks:
            async for chunk in chunks:
                await queue.put((number, chunk))
        await queue.put((number, None))
    except Exception as error:  # the boundary between tasks: whoever reads the queue raises it
        await queue.put((number, error))


def _sound(chunk: Chunk) -> Chunk:
    """The chunk, unless it says that its answer was ended from the server's side."""
    if chunk.error is not None:
        raise chunk.error
    if chunk.finish_reason == "cancelled":
        raise EngineClosed("the model is being unloaded")
    return chunk


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
