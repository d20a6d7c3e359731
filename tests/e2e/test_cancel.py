"""Whoever goes away gives the slot back, whether decoding or waiting. The server decodes one sequence at a time."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

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
