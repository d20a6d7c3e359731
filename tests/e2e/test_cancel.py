"""Whoever goes away gives the slot back, whether decoding or waiting. The server decodes one sequence at a time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from tritonclient.utils import InferenceServerException

from stillhouse.client import AsyncClient, RequestRejected
from stillhouse.serve.launcher import Server

pytestmark = pytest.mark.triton

ENDLESS = {
    "text_input": "Count: one, two,",
    "stream": True,
    "sampling_parameters": json.dumps({"temperature": 0, "max_tokens": 4000, "ignore_eos": True}),
}
SHORT = {"text_input": "Hello", "stream": True, "sampling_parameters": json.dumps({"temperature": 0, "max_tokens": 2})}


def test_a_cancelled_stream_frees_its_slot(narrow_triton: Server, open_stream: Any) -> None:
    with open_stream(narrow_triton, "support-int4", ENDLESS) as endless:
        endless.next()
        with open_stream(narrow_triton, "support-int4", SHORT) as short:
            time.sleep(0.3)
            assert short.results.empty(), "the only slot is taken"
            endless.close(cancel=True)
            gone_s = time.monotonic()
            short.next()
            assert time.monotonic() - gone_s < 2


def test_a_waiting_request_that_is_cancelled_leaves_the_queue(
    narrow_triton: Server, open_stream: Any, metric: Callable[..., float], wait_until: Callable[..., float]
) -> None:
    with open_stream(narrow_triton, "support-int4", ENDLESS) as endless:
        endless.next()
        with open_stream(narrow_triton, "support-int4", SHORT):
            wait_until(lambda: metric(narrow_triton, "num_requests_waiting") == 1)
        wait_until(lambda: metric(narrow_triton, "num_requests_waiting") == 0)
        assert metric(narrow_triton, "num_requests_running") == 1
    wait_until(lambda: metric(narrow_triton, "num_requests_running") == 0)


async def test_streams_that_are_left_at_their_last_token_or_are_refused_leave_no_connection_behind(
    narrow_triton: Server, wait_until: Callable[..., float]
) -> None:
    async def leave(client: AsyncClient) -> None:
        stream = client.stream("support-int4", "Hello", temperature=0, max_tokens=2, ignore_eos=True)
        async for token in stream:
            if token.finish_reason is not None:
                break
        await stream.aclose()

    async def be_refused(client: AsyncClient) -> None:
        for _ in range(10):
            with pytest.raises(RequestRejected):
                await client.generate("support-int4", "Hello", max_tokens=0)

    process = psutil.Process(narrow_triton.pid)
    before = process.num_fds()
    for _ in range(4):
        async with AsyncClient(narrow_triton.grpc_url) as client:
            await asyncio.gather(*(ask(client) for _ in range(4) for ask in (leave, be_refused)))
    await asyncio.to_thread(wait_until, lambda: process.num_fds() <= before)


def test_a_closed_http_stream_frees_its_slot(
    narrow_triton: Server, metric: Callable[..., float], wait_until: Callable[..., float]
) -> None:
    # Of /generate_stream with tokens coming: Triton's HTTP server notices a closed connection only when it writes, so a
    # plain /generate runs to its end.
    address = urlsplit(narrow_triton.http_url)
    body = json.dumps(ENDLESS).encode()
    head = f"POST /v2/models/support-int4/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: metric(narrow_triton, "num_requests_running") == 1)
    wait_until(lambda: metric(narrow_triton, "num_requests_running") == 0)


@pytest.mark.parametrize("asked", [{"timeout": 1_000_000}, {"parameters": {"timeout_s": 1.0}}])
def test_a_request_out_of_time_ends_by_name_over_grpc(
    narrow_triton: Server,
    open_stream: Any,
    metric: Callable[..., float],
    wait_until: Callable[..., float],
    asked: dict[str, Any],
) -> None:
    """Running; then one that waits for the only slot."""
    with (
        open_stream(narrow_triton, "support-int4", ENDLESS, **asked) as endless,
        pytest.raises(InferenceServerException, match=r"no answer within 1 s \(\d+ tokens"),
    ):
        list(endless.until_final())
    with open_stream(narrow_triton, "support-int4", ENDLESS) as endless:
        endless.next()
        with (
            open_stream(narrow_triton, "support-int4", SHORT, **asked) as waiting,
            pytest.raises(InferenceServerException, match=r"no answer within 1 s \(0 tokens"),
        ):
            waiting.next()
    wait_until(lambda: metric(narrow_triton, "num_requests_running") == 0)


@pytest.mark.parametrize("asked", [{"timeout": 300_000}, {"timeout_s": 0.3}])
def test_a_request_out_of_time_ends_by_name_over_http(narrow_triton: Server, asked: dict[str, Any]) -> None:
    data = json.dumps({**ENDLESS, "stream": False, **asked}).encode()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{narrow_triton.http_url}/v2/models/support-int4/generate", data, timeout=60)
    assert refused.value.code == 400  # Triton's for whatever a model says in place of its first response
    assert "no answer within 0.3 s" in json.loads(refused.value.read())["error"]


def test_of_those_who_wait_the_lower_priority_comes_first(
    narrow_triton: Server, open_stream: Any, metric: Callable[..., float], wait_until: Callable[..., float]
) -> None:
    def with_priority(priority: int) -> dict[str, Any]:
        return {
            **SHORT,
            "sampling_parameters": json.dumps({"max_tokens": 200, "ignore_eos": True, "priority": priority}),
        }

    with contextlib.ExitStack() as opened:
        endless = opened.enter_context(open_stream(narrow_triton, "support-int4", ENDLESS))
        endless.next()
        late, soon = (
            opened.enter_context(open_stream(narrow_triton, "support-int4", with_priority(priority)))
            for priority in (1, -1)
        )
        wait_until(lambda: metric(narrow_triton, "num_requests_waiting") == 2)
        endless.close(cancel=True)
        soon.next()
        assert late.results.empty()


def test_many_short_requests_that_are_cancelled_at_any_moment_leave_a_sound_server(
    narrow_triton: Server, open_stream: Any, metric: Callable[..., float], wait_until: Callable[..., float]
) -> None:
    for round_ in range(40):
        with open_stream(narrow_triton, "support-int4", SHORT):
            time.sleep(0.002 * round_)
    with open_stream(narrow_triton, "support-int4", SHORT) as last:
        last.next()
    wait_until(lambda: metric(narrow_triton, "num_requests_running") == 0)
    assert narrow_triton.exit_status() is None
