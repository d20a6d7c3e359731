"""The OpenAI API as a load test asks it, against the small server."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from stillhouse.client import (
    ClientError,
    ConnectionFailed,
    ModelNotFound,
    RequestRejected,
    StreamBroken,
    TimedOut,
)
from stillhouse.loadtest.errors import BadInput, WrongContent
from stillhouse.loadtest.openai_api import OpenAiClient
from stillhouse.loadtest.target import OPENAI, TRITON, choose_model, find_protocol, open_target


@pytest.fixture
def client(shared_server: Any) -> Iterator[OpenAiClient]:
    client = OpenAiClient(f"{shared_server.openai_host}/v1", token_timeout_s=0.4)
    yield client
    client.close()


def body(plan: dict[str, Any] | str, **more: Any) -> dict[str, Any]:
    content = plan if isinstance(plan, str) else json.dumps(plan)
    messages = [{"role": "user", "content": content}]
    return {
        "model": "support-int4",
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }


def test_a_stream_brings_its_text_and_the_servers_count(client: OpenAiClient, shared_server: Any) -> None:
    pieces = list(client.stream(body({"tokens": 3, "first_s": 0.1})))
    assert "".join(piece.text for piece in pieces) == "word0 word1 word2 "
    assert pieces[-1].num_output_tokens == 3 and pieces[-1].num_input_tokens == 7
    tokens = [piece for piece in pieces if piece.carries_token]
    assert len(tokens) == 3, "neither the role nor the usage is a token"
    assert tokens[0].time_s >= shared_server.log()[-1]["first_s"] >= 0.1


def test_whole_answers_and_completions_are_counted_too(client: OpenAiClient) -> None:
    (whole,) = client.stream({**body({"tokens": 3, "first_s": 0.01}), "stream": False, "stream_options": None})
    assert (whole.num_output_tokens, whole.text) == (3, "word0 word1 word2 ")
    raw = {
        "model": "support-int4",
        "prompt": '{"tokens": 2}',
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    pieces = list(client.stream(raw))
    assert ("".join(piece.text for piece in pieces), pieces[-1].num_output_tokens) == ("word0 word1 ", 2)


def test_thoughts_are_told_apart(client: OpenAiClient) -> None:
    pieces = [piece for piece in client.stream(body({"tokens": 4, "think": 2, "first_s": 0})) if piece.carries_token]
    assert [piece.thought for piece in pieces] == [True, True, False, False]


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        ({"error_after": 0}, RequestRejected),
        ({"error_after": 2}, RequestRejected),
        ({"break_after": 2}, StreamBroken),
        ({"end_after": 2}, StreamBroken),
        ({"stall_after": 1}, TimedOut),
        ({"garbage_after": 1}, WrongContent),
    ],
)
def test_what_goes_wrong_has_a_class_of_its_own(
    client: OpenAiClient, plan: dict[str, Any], kind: type[ClientError]
) -> None:
    with pytest.raises(ClientError) as caught:
        list(client.stream(body({"first_s": 0.01, "gap_s": 0, **plan})))
    assert type(caught.value) is kind


def test_an_unknown_model_and_a_dead_port_are_told_apart(client: OpenAiClient) -> None:
    with pytest.raises(ModelNotFound, match="nobody"):
        list(client.stream(body("x", model="nobody")))
    nowhere = OpenAiClient("http://localhost:1/v1")
    assert not nowhere.ready()
    with pytest.raises(ConnectionFailed, match="cannot reach"):
        list(nowhere.stream(body("x")))


def test_a_key_is_sent_and_its_lack_is_hinted_at(guarded_server: Any) -> None:
    host = guarded_server.openai_host
    assert find_protocol(host) == OPENAI, "who wants a key is an API too"
    target = open_target(host, OPENAI, api_key="secret")
    assert choose_model(target, "") == "support-int4"
    with pytest.raises(RequestRejected, match="401") as caught:
        open_target(host, OPENAI).models()
    assert "OPENAI_API_KEY" in (caught.value.hint or "")


def test_the_protocol_is_found_out_by_the_host(shared_server: Any) -> None:
    assert find_protocol(shared_server.grpc_host) == TRITON
    assert find_protocol(shared_server.http_host) == TRITON
    assert find_protocol(shared_server.openai_host) == OPENAI
    assert find_protocol("http://nobody.invalid/v1") == OPENAI, "nothing needs to be asked"
    with pytest.raises(ConnectionFailed):
        find_protocol("http://localhost:1")


def test_a_server_of_something_else_is_refused() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

    other = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        with pytest.raises(BadInput, match="answers neither"):
            find_protocol(f"http://127.0.0.1:{other.server_port}")
    finally:
        other.shutdown()
        other.server_close()


def test_a_port_that_accepts_and_says_nothing_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = OpenAiClient(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", timeout_s=0.2)
        with pytest.raises(TimedOut, match=r"longer than 0\.2 s"):
            list(client.stream(body("x")))


HEAD = b"\r\nContent-Type: text/event-stream\r\n\r\n"
EVENT = b'data: {"choices": [{"delta": {"content": "word0 "}, "finish_reason": null}]}\n\n'


@pytest.mark.parametrize("head", [b"HTTP/1.0 200 OK", b"HTTP/1.1 200 OK\r\nConnection: close"])
def test_a_stall_times_out_on_a_connection_that_will_be_closed_too(
    http_answers: Callable[..., str], head: bytes
) -> None:
    client = OpenAiClient(http_answers(head + HEAD + EVENT, hold=True), token_timeout_s=0.2, timeout_s=4.0)
    with pytest.raises(TimedOut, match=r"no further token for 0\.2 s after 1 responses"):
        list(client.stream(body("x")))


def test_the_first_token_has_the_time_of_the_whole_answer(http_answers: Callable[..., str]) -> None:
    """As over Triton: the time between tokens begins with the first, not with the head of the answer."""
    client = OpenAiClient(
        http_answers(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked" + HEAD, hold=True),
        token_timeout_s=0.05,
        timeout_s=0.4,
    )
    with pytest.raises(TimedOut, match=r"longer than 0\.4 s \(0 responses came\)"):
        list(client.stream(body("x")))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (b'"word0 "', b'[{"type": "text", "text": "word0 "}]'),
        (b'"choices"', b'"usage": {"completion_tokens": "1"}, "choices"'),
    ],
)
def test_a_text_in_parts_or_a_count_in_letters_is_another_protocol(
    http_answers: Callable[..., str], right: bytes, wrong: bytes
) -> None:
    client = OpenAiClient(http_answers(b"HTTP/1.0 200 OK" + HEAD + EVENT.replace(right, wrong)))
    with pytest.raises(WrongContent, match="not a completion's"):
        list(client.stream(body("x")))


def test_an_error_that_is_none_is_none(http_answers: Callable[..., str]) -> None:
    event = EVENT.replace(b'"choices"', b'"error": null, "choices"') + b"data: [DONE]\n\n"
    client = OpenAiClient(http_answers(b"HTTP/1.0 200 OK" + HEAD + event))
    assert [piece.text for piece in client.stream(body("x"))] == ["word0 "]
