"""Clients that go away, connections that are kept, and the end of a server."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from http.client import HTTPResponse
from typing import Any

import httpx
import pytest

from stillhouse.edge.serving import open_engines
from stillhouse.engine.options import EngineOptions
from stillhouse.gateway import connection, sse
from stillhouse.gateway.address import bound
from stillhouse.gateway.server import GatewayServer

ENDLESS: Any = {
    "model": "support-int4",
    "messages": [{"role": "user", "content": "Count."}],
    "ignore_eos": True,
    "max_tokens": 450,
}


def running(server: GatewayServer) -> float:
    generator = server.gateway.generator
    assert generator is not None
    return sum(figure.value for figure in generator.figures() if figure.name.startswith("num_requests"))


def send(server: GatewayServer, body: dict[str, Any]) -> socket.socket:
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + data)
    return connection


def read_answer(connection: socket.socket) -> tuple[int, Any]:
    """The next answer on a connection that may be kept: its status and the JSON of its body."""
    answer = HTTPResponse(connection)
    answer.begin()
    return answer.status, json.loads(answer.read())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_goes_away_gives_its_slots_back(
    server: GatewayServer, wait_until: Callable[..., float], stream: bool, n: int
) -> None:
    wait_until(lambda: running(server) == 0)
    connection = send(server, ENDLESS | {"stream": stream, "n": n})
    wait_until(lambda: running(server) == n)
    connection.close()
    wait_until(lambda: running(server) == 0, timeout_s=2.0)
    wait_until(lambda: server.gateway.in_flight == 0, timeout_s=2.0)


@pytest.mark.slow
def test_an_idle_connection_is_kept(server: GatewayServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        for _ in range(2):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                piece = connection.recv(65536)
                assert piece, "the connection was closed"
                answer += piece
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(7)


@pytest.mark.parametrize("begun", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_connection_that_never_says_what_it_wants_is_closed(
    server: GatewayServer, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as silent:
        silent.sendall(begun)
        assert silent.recv(1) == b""


def test_a_kept_connection_is_closed_when_its_next_request_does_not_come_whole(
    server: GatewayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as kept:
        for _ in range(2):
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                piece = kept.recv(65536)
                assert piece, "the connection was closed"
                answer += piece
            time.sleep(0.5)  # between requests it is not in question
        kept.sendall(b"GET /hea")
        assert kept.recv(1) == b""


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        ("POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 1000", b"{"),
        ("GET /health HTTP/1.1\r\nContent-Length: 1000", b"{"),
        ("GET /health HTTP/1.1\r\nTransfer-Encoding: chunked", b"1\r\n{\r\n"),
    ],
)
def test_a_connection_whose_body_does_not_come_after_its_answer_is_closed(
    narrow_server: GatewayServer, monkeypatch: pytest.MonkeyPatch, head: str, piece: bytes
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.3)
    with socket.create_connection(("127.0.0.1", narrow_server.port), timeout=10) as silent:
        silent.sendall(f"{head}\r\nHost: x\r\n\r\n".encode())
        assert read_answer(silent)[0] == (401 if head.startswith("POST") else 200)
        silent.sendall(piece)
        assert silent.recv(1) == b""


def test_a_connection_is_kept_when_its_body_comes_after_its_answer(
    narrow_server: GatewayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 5.0)
    with socket.create_connection(("127.0.0.1", narrow_server.port), timeout=10) as kept:
        for _ in range(2):
            kept.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n")
            assert read_answer(kept)[0] == 401
            kept.sendall(b"{")
            kept.sendall(b"}")
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(kept)[0] == 200


def test_what_is_no_http_gets_an_error_in_the_same_shape(server: GatewayServer) -> None:
    for sent in (b"\x16\x03\x01 \r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 2**17):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as foreign:
            foreign.sendall(sent)
            status, body = read_answer(foreign)
            assert status == 400
            assert body["error"]["type"] == "invalid_request_error"
            assert "no request of HTTP/1.1, or its head is larger than 65536 bytes" in body["error"]["message"]


def test_what_is_no_http_behind_an_answer_ends_the_connection_in_silence(
    narrow_server: GatewayServer, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(("127.0.0.1", narrow_server.port), timeout=10) as broken:
        broken.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert read_answer(broken)[0] == 401
        broken.sendall(b"no size of a chunk\r\n")
        assert broken.recv(1) == b""
    assert caplog.records == []


def test_a_stream_ends_with_done_and_is_not_held_back_by_proxies(server: GatewayServer) -> None:
    asked = ENDLESS | {"stream": True, "max_tokens": 3}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=asked) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_a_stream_that_waits_is_kept_open_by_comments(
    narrow_server: GatewayServer, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., float]
) -> None:
    monkeypatch.setattr(sse, "SILENT_S", 0.05)
    asked, key = ENDLESS | {"stream": True}, {"Authorization": "Bearer sesame"}
    url = f"{narrow_server.url}/v1/chat/completions"
    with contextlib.ExitStack() as opened:
        running_one = opened.enter_context(httpx.stream("POST", url, json=asked, headers=key, timeout=60))
        its_lines = running_one.iter_lines()  # which closes the connection when it goes
        next(its_lines)
        waiting_one = opened.enter_context(
            httpx.stream("POST", url, json=asked | {"max_tokens": 2}, headers=key, timeout=60)
        )
        lines = (line for line in waiting_one.iter_lines() if line)
        assert [next(lines) for _ in range(3)] == [": keep-alive"] * 3
        running_one.close()
        *events, done = (line for line in lines if not line.startswith(":"))
    assert done == "data: [DONE]"
    assert json.loads(events[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    wait_until(lambda: running(narrow_server) == 0)


def test_a_client_that_goes_away_while_comments_come_leaves_the_queue(
    narrow_server: GatewayServer, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., float]
) -> None:
    monkeypatch.setattr(sse, "SILENT_S", 0.05)
    asked, key = ENDLESS | {"stream": True}, {"Authorization": "Bearer sesame"}
    url = f"{narrow_server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=asked, headers=key, timeout=60) as running_one:
        its_lines = running_one.iter_lines()  # which closes the connection when it goes
        next(its_lines)
        with httpx.stream("POST", url, json=asked, headers=key, timeout=60) as waiting_one:
            lines = waiting_one.iter_lines()
            assert next(lines) == ": keep-alive"
            assert running(narrow_server) == 2
        wait_until(lambda: running(narrow_server) == 1)
    wait_until(lambda: running(narrow_server) == 0)


def test_small_packets_are_not_held_back() -> None:
    # A connection inherits the protocol of its listening socket, and asyncio asks it before it sets TCP_NODELAY.
    with bound("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_a_request_keeps_its_number(server: GatewayServer) -> None:
    assert httpx.get(f"{server.url}/health", headers={"X-Request-Id": "abc"}).headers["x-request-id"] == "abc"
    assert httpx.get(f"{server.url}/health", headers={"X-Request-Id": "é".encode()}).headers["x-request-id"] != "é"


def test_draining_refuses_new_requests_and_ends_running_ones(
    version_dir: Any, wait_until: Callable[..., float]
) -> None:
    server = GatewayServer("127.0.0.1", 0)
    server.start()
    server.plug(lambda: open_engines([(version_dir, EngineOptions(max_num_seqs=2, max_model_len=512))]))
    answers: list[httpx.Response] = []
    asked = ENDLESS | {"max_tokens": 150}
    asker = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60))
    )
    asker.start()
    wait_until(lambda: running(server) == 1)
    ending = threading.Thread(target=server.drain, args=(30.0,))
    ending.start()
    wait_until(lambda: server.gateway.draining)
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=asked)
    assert refused.status_code == 503
    assert refused.headers["connection"] == "close"
    asker.join()
    ending.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 150
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_a_stream_that_is_cut_at_the_end_of_the_grace_time_says_so(version_dir: Any) -> None:
    server = GatewayServer("127.0.0.1", 0)
    server.start()
    server.plug(lambda: open_engines([(version_dir, EngineOptions(max_num_seqs=2, max_model_len=512))]))
    asked = ENDLESS | {"stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=asked, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        ending = threading.Thread(target=server.drain, args=(0.1,))
        ending.start()
        rest = [line for line in lines if line]
    ending.join()
    assert rest[-1] == "data: [DONE]"
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert (error["code"], error["message"]) == ("service_unavailable", "the engine is shutting down")


def test_the_metrics_page_counts_requests_and_tokens(server: GatewayServer) -> None:
    def value(line: str) -> float:
        page = httpx.get(f"{server.url}/metrics").text
        return sum(float(found.rsplit(" ", 1)[1]) for found in page.splitlines() if found.startswith(line))

    tokens = 'stillhouse_gateway_generation_tokens_total{model_name="support-int4"'
    requests = 'stillhouse_gateway_requests_total{path="/v1/chat/completions",status="200"'
    before = value(tokens), value(requests)
    httpx.post(f"{server.url}/v1/chat/completions", json=ENDLESS | {"max_tokens": 5}, timeout=60)
    assert (value(tokens), value(requests)) == (before[0] + 5, before[1] + 1)
    assert value('stillhouse_num_requests_running{model_name="support-int4"') == 0
