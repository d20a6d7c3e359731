"""Several answers at once, mixed as they come; each is cancelled when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from stillhouse.engine.answer import Chunk
from stillhouse.engine.errors import EngineClosed, QueueFull

_BUFFERED = 256
_AGAIN_S = 1.0  # when a refused stream comes again, unless one of its own request ends before

T = TypeVar("T")
Stream = AsyncGenerator[Chunk, None]


async def merged(streams: Sequence[Callable[[], Stream]], together: int) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The chunks of all streams, each with its stream's number; `together` of them run at a time.

    The first error ends all, and is raised; but once one of them has been let in, those for whom the queue is full come
    again: a request is refused at once, or answered.
    """
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]()) as only:
            async for chunk in only:
                yield 0, _sound(chunk)
        return
    queue: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue(_BUFFERED)
    turns = _Turns(asyncio.Semaphore(together))
    tasks = [asyncio.create_task(_pump(number, stream, queue, turns)) for number, stream in enumerate(streams)]
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


@dataclass
class _Turns:
    """Which of a request's streams may run: `gate` bounds them, `ended` wakes one of the refused when one has ended."""

    gate: asyncio.Semaphore
    ended: asyncio.Condition = field(default_factory=asyncio.Condition)
    inside: int = 0  # as far as is known: a stream that is refused says so a moment later
    begun: bool = False  # one of them has been let in for sure


async def _pump(
    number: int,
    stream: Callable[[], Stream],
    queue: asyncio.Queue[tuple[int, Chunk | Exception | None]],
    turns: _Turns,
) -> None:
    try:
        async with turns.gate:
            while (refusal := await _run(number, stream, queue, turns)) is not None:
                if not (turns.inside or turns.begun):
                    raise refusal
                async with turns.ended:
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(turns.ended.wait(), _AGAIN_S)
        await queue.put((number, None))
    except Exception as error:  # the boundary between tasks: whoever reads the queue raises it
        await queue.put((number, error))


async def _run(
    number: int,
    stream: Callable[[], Stream],
    queue: asyncio.Queue[tuple[int, Chunk | Exception | None]],
    turns: _Turns,
) -> QueueFull | None:
    """Hands the chunks over; None at their end, or why there are none."""
    turns.inside += 1
    try:
        async with contextlib.aclosing(stream()) as chunks:
            async for chunk in chunks:
                turns.begun = True
                await queue.put((number, chunk))
    except QueueFull as error:
        return error
    finally:
        turns.inside -= 1
    async with turns.ended:
        turns.ended.notify()
    return None


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
