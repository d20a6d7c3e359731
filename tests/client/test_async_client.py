"""`AsyncClient` against the same server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from stillhouse.client import (
    AsyncClient,
    ClientError,
    ConnectionFailed,
    ModelNotFound,
    RequestRejected,
    StreamBroken,
    TimedOut,
)

MODEL = "support-int4"


def plan(**wishes: Any) -> str:
    return json.dumps(wishes)


@pytest.fixture
async def client(small_server: Any, scheme: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(small_server.url(scheme)) as client:
        yield client


async def test_generate_and_stream_agree(client: AsyncClient) -> None:
    whole = await client.generate(MODEL, plan(tokens=5))
    tokens = [token async for token in client.stream(MODEL, plan(tokens=5))]
    assert "".join(token.text for token in tokens) == whole.text == "word0 word1 word2 word3 word4 "
    assert tokens[-1].num_output_tokens == whole.num_output_tokens == 5
    assert tokens[-1].finish_reason == whole.finish_reason == "stop"


async def test_chat_streams_or_not(client: AsyncClient) -> None:
    messages = [{"role": "user", "content": plan(tokens=2)}]
    assert (await client.chat(MODEL, messages)).text == "word0 word1 "
    assert [token.text async for token in await client.chat(MODEL, messages, stream=True)] == ["word0 ", "word1 "]


async def test_two_hundred_streams_run_side_by_side(client: AsyncClient) -> None:
    async def ask() -> float:
        return [token.time_s async for token in client.stream(MODEL, plan(tokens=5, first_s=0.5))][-1]

    started = time.perf_counter()
    times = await asyncio.gather(*(ask() for _ in range(200)))
    assert min(times) > 0.5
    assert time.perf_counter() - started < 5


async def test_leaving_the_iterator_cancels_on_the_server(client: AsyncClient, small_server: Any, scheme: str) -> None:
    mark = plan(tokens=500, gap_s=0.02, mark=f"async {scheme}")
    stream = client.stream(MODEL, mark)
    await anext(stream)
    await stream.aclose()
    await asyncio.sleep(0.3)
    log = await asyncio.to_thread(small_server.log)
    entry = next(e for e in log if e["inputs"].get("text_input") == mark)
    assert entry["ended"] == "cancelled"
    assert entry["sent"] < 20


async def test_a_stream_that_is_left_at_its_last_token_ends_by_itself(small_server: Any) -> None:
    """Cancelled there, Triton would keep its connection for ever."""
    mark = plan(tokens=3, end_s=0.1, mark="async, left at the last token")
    async with AsyncClient(small_server.url("grpc")) as client:
        stream = client.stream(MODEL, mark)
        async for token in stream:
            if token.finish_reason is not None:
                break
        await stream.aclose()
    log = await asyncio.to_thread(small_server.log)
    assert next(e for e in log if e["inputs"].get("text_input") == mark)["ended"] == "done"


async def test_a_stream_that_ended_in_an_error_ends_by_itself(small_server: Any) -> None:
    """As above."""
    mark = plan(tokens=3, error_after=1, end_s=0.1, mark="async, an error")
    async with AsyncClient(small_server.url("grpc")) as client:
        with pytest.raises(StreamBroken):
            _ = [token async for token in client.stream(MODEL, mark)]
    log = await asyncio.to_thread(small_server.log)
    assert next(e for e in log if e["inputs"].get("text_input") == mark)["status"] == "sent"


async def test_cancelling_the_task_cancels_on_the_server(client: AsyncClient, small_server: Any, scheme: str) -> None:
    mark = plan(stall_after=1, mark=f"task {scheme}")

    async def ask() -> None:
        async for _ in client.stream(MODEL, mark):
            pass

    task = asyncio.create_task(ask())
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.2)
    log = await asyncio.to_thread(small_server.log)
    assert next(e for e in log if e["inputs"].get("text_input") == mark)["ended"] == "cancelled"
    assert (await client.generate(MODEL, plan(tokens=1))).text == "word0 "


@pytest.mark.parametrize("wishes", [{"stall_after": 0}, {"stall_after": 1}])
async def test_closing_the_client_ends_its_streams_as_nobody_cancelled(
    client: AsyncClient, small_server: Any, scheme: str, wishes: dict[str, Any]
) -> None:
    mark = plan(**wishes, mark=f"closed async {scheme}")

    async def ask() -> None:
        async for _ in client.stream(MODEL, mark):
            begun.set()

    begun = asyncio.Event()
    task = asyncio.create_task(ask())
    if wishes["stall_after"]:
        await asyncio.wait_for(begun.wait(), 5)
    else:
        while not any(e["inputs"].get("text_input") == mark for e in await asyncio.to_thread(small_server.log)):
            await asyncio.sleep(0.02)
    await client.close()
    with pytest.raises(StreamBroken if wishes["stall_after"] else ConnectionFailed):
        await asyncio.wait_for(task, 5)
    assert not task.cancelled()


async def test_a_task_that_is_cancelled_as_its_client_closes_stays_so(client: AsyncClient) -> None:
    async def ask() -> None:
        async for _ in client.stream(MODEL, plan(stall_after=1)):
            begun.set()

    begun = asyncio.Event()
    task = asyncio.create_task(ask())
    await asyncio.wait_for(begun.wait(), 5)
    task.cancel()
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("wishes", "error"),
    [
        ({"error_after": 0}, RequestRejected),
        ({"error_after": 2}, StreamBroken),
        ({"break_after": 2}, StreamBroken),
        ({"end_after": 2}, StreamBroken),
        ({"stall_after": 2}, TimedOut),
    ],
)
async def test_errors_are_the_sync_clients(
    client: AsyncClient, wishes: dict[str, Any], error: type[ClientError]
) -> None:
    with pytest.raises(error) as caught:
        async for _ in client.stream(MODEL, plan(**wishes), token_timeout_s=0.2):
            pass
    assert type(caught.value) is error


async def test_the_whole_answer_has_its_time_out(client: AsyncClient) -> None:
    for wishes in ({"stall_after": 0}, {"tokens": 1000, "gap_s": 0.02}):
        with pytest.raises(TimedOut, match=r"longer than 0\.3 s"):
            async for _ in client.stream(MODEL, plan(**wishes), timeout_s=0.3):
                pass


async def test_models_ready_and_an_unknown_model(client: AsyncClient) -> None:
    assert {entry.name for entry in await client.models()} == {"support-fp16", "support-int4"}
    assert await client.ready()
    assert not await client.ready("nobody")
    with pytest.raises(ModelNotFound):
        await client.generate("nobody", "x")


async def test_nobody_listening_is_said(scheme: str) -> None:
    async with AsyncClient(f"{scheme}://127.0.0.1:9") as client:
        with pytest.raises(ConnectionFailed, match=r"cannot reach 127\.0\.0\.1:9"):
            await client.generate(MODEL, "x")
        with pytest.raises(ConnectionFailed):
            await client.models()
        assert not await client.ready()
