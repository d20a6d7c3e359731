"""`Client` against a real server with known behaviour, over gRPC and HTTP."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from stillhouse.client import (
    Client,
    ConnectionFailed,
    InvalidCall,
    ModelNotFound,
    RequestRejected,
    StreamBroken,
    TimedOut,
)

MODEL = "support-int4"


def plan(**wishes: Any) -> str:
    return json.dumps(wishes)


@pytest.fixture
def client(small_server: Any, scheme: str) -> Iterator[Client]:
    with Client(small_server.url(scheme)) as client:
        yield client


def test_generate_gives_the_whole_answer_and_the_servers_counts(client: Client) -> None:
    answer = client.generate(MODEL, plan(tokens=4))
    assert answer.text == "word0 word1 word2 word3 "
    assert answer.finish_reason == "stop"
    assert (answer.num_input_tokens, answer.num_output_tokens) == (7, 4)
    assert answer.cumulative_logprob == pytest.approx(-2.0)
    assert answer.ttft_s is None
    assert 0.05 <= answer.e2e_s < 1


def test_stream_gives_each_token_at_its_time(client: Client) -> None:
    client.ready()  # so that the connection stands
    tokens = list(client.stream(MODEL, plan(tokens=6, first_s=0.2, gap_s=0.05)))
    assert [token.text for token in tokens] == [f"word{i} " for i in range(6)]
    assert [token.index for token in tokens] == list(range(6))
    assert [token.num_output_tokens for token in tokens] == list(range(1, 7))
    assert [token.finish_reason for token in tokens] == [None] * 5 + ["stop"]
    for i, token in enumerate(tokens):
        assert 0.2 + i * 0.05 <= token.time_s < 0.2 + i * 0.05 + 0.2  # how late depends on who else uses the machine


def test_stream_starts_its_clock_at_the_first_token_asked_for(client: Client) -> None:
    stream = client.stream(MODEL, plan(tokens=1, first_s=0.05))
    time.sleep(0.3)
    assert next(stream).time_s < 0.2


def test_the_tensors_are_the_vllm_backends(client: Client) -> None:
    sampling = {"max_tokens": 3, "temperature": 0.0, "stop": ["\n", "ende"]}
    inputs = json.loads(next(client.stream(MODEL, plan(echo=True), **sampling)).text)
    assert inputs["text_input"] == plan(echo=True)
    assert inputs["stream"] is True
    assert json.loads(inputs["sampling_parameters"]) == sampling
    assert inputs["exclude_input_in_output"] is True
    assert inputs["return_num_output_tokens"] is True
    assert "messages" not in inputs
    assert "input_ids" not in inputs


def test_chat_sends_messages_and_input_ids_are_sent_as_numbers(client: Client) -> None:
    messages = [{"role": "system", "content": "Grüße"}, {"role": "user", "content": plan(echo=True, tokens=1)}]
    answer = client.chat(MODEL, messages)
    inputs = json.loads(answer.text)
    assert json.loads(inputs["messages"]) == messages
    assert inputs["stream"] is False
    assert "text_input" not in inputs
    streamed = list(client.chat(MODEL, messages, stream=True, max_tokens=5))
    assert json.loads(streamed[0].text)["stream"] is True
    assert list(client.stream(MODEL, input_ids=[1, 2, 70000]))[-1].finish_reason == "stop"


def test_a_version_can_be_named(client: Client) -> None:
    assert client.generate(MODEL, plan(tokens=1), version=2).text == "word0 "
    with pytest.raises(ModelNotFound, match="version 7"):
        client.generate(MODEL, plan(tokens=1), version=7)


def test_a_stream_that_is_left_at_its_last_token_ends_by_itself(small_server: Any) -> None:
    """Cancelled there, Triton would keep its connection for ever."""
    mark = plan(tokens=3, end_s=0.1, mark="left at the last token")
    with Client(small_server.url("grpc")) as client:
        stream = client.stream(MODEL, mark)
        while next(stream).finish_reason is None:
            pass
        stream.close()
    assert next(e for e in small_server.log() if e["inputs"].get("text_input") == mark)["ended"] == "done"


def test_a_stream_that_ended_in_an_error_ends_by_itself(small_server: Any) -> None:
    """As above."""
    mark = plan(tokens=3, error_after=1, end_s=0.1, mark="an error")
    with Client(small_server.url("grpc")) as client, pytest.raises(StreamBroken):
        list(client.stream(MODEL, mark))
    assert next(e for e in small_server.log() if e["inputs"].get("text_input") == mark)["status"] == "sent"


def test_closing_the_iterator_cancels_on_the_server(client: Client, small_server: Any, scheme: str) -> None:
    mark = plan(tokens=500, gap_s=0.02, mark=f"closing {scheme}")
    stream = client.stream(MODEL, mark)
    next(stream)
    stream.close()
    time.sleep(0.3)
    entry = next(e for e in small_server.log() if e["inputs"].get("text_input") == mark)
    assert entry["ended"] == "cancelled"
    sent = entry["sent"]
    time.sleep(0.1)
    entry = next(e for e in small_server.log() if e["inputs"].get("text_input") == mark)
    assert entry["sent"] == sent < 20


def test_threads_share_a_client(client: Client) -> None:
    def ask(number: int) -> str:
        tokens = client.stream(MODEL, plan(tokens=number, first_s=0.1, gap_s=0.02))
        return "".join(token.text for token in tokens)

    started = time.perf_counter()
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(1, 21)))
    assert [answer.count("word") for answer in answers] == list(range(1, 21))
    assert time.perf_counter() - started < 3  # one after the other they would take 5.8 s


def test_models_and_ready(client: Client) -> None:
    assert [(m.name, m.version, m.ready) for m in client.models()] == [
        ("support-fp16", "1", True),
        ("support-int4", "1", True),
        ("support-int4", "2", True),
    ]
    assert client.ready()
    assert client.ready(MODEL)
    assert not client.ready("nobody")


def test_an_unknown_model_is_named(client: Client) -> None:
    for ask in (client.generate, lambda *a: list(client.stream(*a))):
        with pytest.raises(ModelNotFound, match="nobody") as caught:
            ask("nobody", "hello")
        assert caught.value.hint


def test_a_models_error_before_the_first_token_is_a_rejection(client: Client) -> None:
    for ask in (client.generate, lambda *a: list(client.stream(*a))):
        with pytest.raises(RequestRejected, match="max_tokens must be at least 1") as caught:
            ask(MODEL, plan(error_after=0, error="max_tokens must be at least 1, got 0"))
        assert type(caught.value) is RequestRejected


@pytest.mark.parametrize("fault", ["error_after", "break_after", "end_after"])
def test_what_goes_wrong_after_the_first_token_breaks_the_stream(client: Client, fault: str) -> None:
    stream = client.stream(MODEL, plan(**{fault: 3}))
    texts = [next(stream).text for _ in range(3)]
    assert texts == ["word0 ", "word1 ", "word2 "]
    with pytest.raises(StreamBroken, match=r"3 tokens|broke off"):
        next(stream)


def test_a_stream_that_stalls_times_out_between_tokens(client: Client) -> None:
    stream = client.stream(MODEL, plan(stall_after=2), token_timeout_s=0.2)
    next(stream)
    next(stream)
    started = time.perf_counter()
    with pytest.raises(TimedOut, match=r"no further token for 0\.2 s after 2 tokens"):
        next(stream)
    assert 0.15 < time.perf_counter() - started < 1.5


@pytest.mark.parametrize("head", ["HTTP/1.0 200 OK", "HTTP/1.1 200 OK\r\nConnection: close"])
def test_a_stream_that_stalls_times_out_on_a_connection_that_will_be_closed_too(
    http_answers: Callable[..., str], head: str
) -> None:
    event = b'data: {"text_output": "word0 ", "finish_reason": "None", "num_output_tokens": 1}\n\n'
    url = http_answers(head.encode() + b"\r\nContent-Type: text/event-stream\r\n\r\n" + event, hold=True)
    with Client(url, timeout_s=4.0) as client, pytest.raises(TimedOut, match=r"no further token for 0\.2 s"):
        list(client.stream(MODEL, "x", token_timeout_s=0.2))


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_without_a_finish_reason_is_whole_when_its_body_has_ended(
    http_answers: Callable[..., str], stream: bool
) -> None:
    body = b'{"text_output": "word0 "}'
    body = b"data: " + body + b"\n\n" if stream else body
    url = http_answers(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    with Client(url) as client:
        if stream:
            assert [token.text for token in client.stream(MODEL, "x")] == ["word0 "]
        else:
            assert client.generate(MODEL, "x").text == "word0 "


@pytest.mark.parametrize("value", ['{"text_output": ["a"]}', '{"text_output": "a", "num_output_tokens": "1"}'])
def test_a_text_in_parts_or_a_count_in_letters_is_refused(http_answers: Callable[..., str], value: str) -> None:
    url = http_answers(f"HTTP/1.0 200 OK\r\n\r\n{value}".encode())
    with Client(url) as client, pytest.raises(RequestRejected, match="text is no text"):
        client.generate(MODEL, "x")


def test_what_a_model_does_not_take_is_not_asked_for(client: Client) -> None:
    known = ["text_input", "stream", "return_num_output_tokens"]
    inputs = json.loads(client.generate(MODEL, plan(echo=True, tokens=1), model_inputs=known, max_tokens=1).text)
    assert set(inputs) == {*known, "sampling_parameters"}


def test_the_time_out_of_the_whole_answer_counts_from_the_request(client: Client) -> None:
    for wishes in ({"stall_after": 0}, {"tokens": 1000, "gap_s": 0.02}):
        started = time.perf_counter()
        with pytest.raises(TimedOut, match=r"longer than 0\.3 s"):
            list(client.stream(MODEL, plan(**wishes), timeout_s=0.3))
        assert 0.25 < time.perf_counter() - started < 2
    started = time.perf_counter()
    with pytest.raises(TimedOut, match=r"longer than 0\.3 s"):
        client.generate(MODEL, plan(stall_after=0), timeout_s=0.3)
    assert 0.25 < time.perf_counter() - started < 2


def test_a_slow_reader_is_no_time_out(client: Client) -> None:
    stream = client.stream(MODEL, plan(tokens=5), token_timeout_s=0.2)
    next(stream)
    time.sleep(0.5)
    assert len(list(stream)) == 4


def test_the_client_goes_on_after_an_error(client: Client) -> None:
    for wishes in ({"break_after": 1}, {"error_after": 0}, {"error_after": 2}):
        with pytest.raises((StreamBroken, RequestRejected)):
            list(client.stream(MODEL, plan(**wishes)))
        assert client.generate(MODEL, plan(tokens=2)).text == "word0 word1 "


def test_nobody_listening_is_said_at_once(scheme: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        client = Client(f"{scheme}://127.0.0.1:{port}")
        started = time.perf_counter()
        for ask in (lambda: client.generate(MODEL, "x"), lambda: list(client.stream(MODEL, "x")), client.models):
            with pytest.raises(ConnectionFailed, match=f"cannot reach 127.0.0.1:{port}") as caught:
                ask()
            assert "started" in (caught.value.hint or "")
        assert not client.ready()
        assert not client.ready(MODEL)
        assert time.perf_counter() - started < 5


def test_a_server_that_dies_breaks_the_stream(mortal_server: Any, scheme: str) -> None:
    client = Client(mortal_server.url(scheme))
    stream = client.stream(MODEL, plan(tokens=1000))
    next(stream)
    mortal_server.kill()
    with pytest.raises(StreamBroken):
        list(stream)
    with pytest.raises(ConnectionFailed):
        client.generate(MODEL, "x")


def test_closing_the_client_ends_its_grpc_streams_and_what_comes_then_is_refused(small_server: Any) -> None:
    client, mark = Client(small_server.url("grpc")), plan(stall_after=0, mark="closed")
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(client.generate, MODEL, mark)
        while not any(entry["inputs"].get("text_input") == mark for entry in small_server.log()):
            time.sleep(0.02)
        client.close()
        with pytest.raises(ConnectionFailed, match="was closed before the answer came"):
            answer.result(5)
    for ask in (
        client.ready,
        client.models,
        lambda: client.generate(MODEL, "x"),
        lambda: next(client.stream(MODEL, "x")),
    ):
        with pytest.raises(InvalidCall, match="is closed"):
            ask()


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({}, "exactly one of prompt, messages and input_ids is given, got none"),
        ({"prompt": "a", "input_ids": [1]}, "got prompt, input_ids"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": ["hello"]}, "a message is .*, got 'hello'"),
        ({"prompt": "a", "stop": {1, 2}}, "sampling parameters must be what JSON can hold"),
        ({"prompt": "a", "temperature": float("nan")}, "sampling parameters must be what JSON can hold"),
        ({"prompt": "half \ud83d"}, "text that UTF-8 can hold"),
        ({"prompt": "a", "version": "latest"}, "version is a whole number"),
        ({"prompt": "a", "timeout_s": 0}, "timeout_s must be above 0"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_sent(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(InvalidCall, match=rule):
        Client("localhost:1").generate(MODEL, **arguments)
