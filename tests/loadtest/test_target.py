"""Servers that are not ours: other models of the vLLM contract, servers that list no models, other paths of the API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from stillhouse.client import ConnectionFailed, InvalidCall
from stillhouse.loadtest import target as module
from stillhouse.loadtest.errors import BadInput, KeyRefused
from stillhouse.loadtest.pieces import Answer
from stillhouse.loadtest.target import OPENAI, TRITON, choose_model, open_target, resolve

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("over", ["grpc", "http"])
def test_messages_become_a_text_for_a_model_that_takes_none(foreign_server: Any, over: str) -> None:
    target = open_target(getattr(foreign_server, f"{over}_host"))
    pieces = list(target.ask("support-int4", "", {"messages": MESSAGES}, {"max_tokens": 3}, stream=True))
    target.close()
    assert pieces[-1].num_output_tokens == 3
    inputs = foreign_server.log()[-1]["inputs"]
    assert inputs["text_input"] == "Be brief.\n\nHello" and "messages" not in inputs


@pytest.mark.parametrize("over", ["grpc", "http"])
def test_messages_stay_messages_for_a_model_that_takes_them(shared_server: Any, over: str) -> None:
    target = open_target(getattr(shared_server, f"{over}_host"))
    list(target.ask("support-int4", "", {"messages": MESSAGES}, {"max_tokens": 3}, stream=True))
    target.close()
    assert "messages" in shared_server.log()[-1]["inputs"]


def test_after_preparing_no_request_of_any_target_asks_what_the_model_takes(
    foreign_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, other = (open_target(foreign_server.http_host) for _ in range(2))
    prepared.prepare("support-int4", "")
    monkeypatch.setattr(module, "_input_names", lambda *_: pytest.fail("asked within a request"))
    for target in (prepared, other):
        list(target.ask("support-int4", "", {"messages": MESSAGES}, {"max_tokens": 3}, stream=True))
        target.close()
    assert foreign_server.log()[-1]["inputs"]["text_input"] == "Be brief.\n\nHello"


@pytest.mark.parametrize("over", ["grpc", "http"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_model_that_counts_nothing_and_ends_with_an_empty_response_has_its_tokens_counted(
    uncounted_server: Any, over: str, stream: bool
) -> None:
    target = open_target(getattr(uncounted_server, f"{over}_host"))
    answer = Answer()
    for piece in target.ask("support-int4", "", {"prompt": "Hello"}, {"max_tokens": 4}, stream=stream):
        answer.add(piece)
    target.close()
    assert answer.text == "word0 word1 word2 word3 " and answer.counted is None
    assert answer.responses == (4 if stream else 1)
    assert not [name for name in uncounted_server.log()[-1]["inputs"] if name.startswith("return_")]


@pytest.fixture
def mute_grpc_host() -> Iterator[str]:
    """One that knows no method at all."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


REFUSAL = b"HTTP/1.0 501 Unsupported\r\n\r\n<!DOCTYPE HTML>\n<html>\n<head>\n<title>Error response</title>\n</html>"


def test_a_server_that_lists_no_models_is_believed_to_have_the_wished_one(
    http_answers: Callable[..., str], mute_grpc_host: str
) -> None:
    web = http_answers(REFUSAL)
    for host, protocol in ((web, TRITON), (web, OPENAI), (mute_grpc_host, TRITON)):
        target = open_target(host, protocol)
        assert choose_model(target, "theirs") == "theirs"
        if host == mute_grpc_host or protocol == OPENAI:
            assert target.ready(), "it is there, whatever it knows"
        with pytest.raises(BadInput, match="does not list its models: ") as caught:
            choose_model(target, "")
        assert "--model" in (caught.value.hint or "") and "\n" not in str(caught.value)
        assert "<" not in str(caught.value)
        target.close()


def test_who_is_not_there_or_wants_a_key_is_not_believed(guarded_server: Any) -> None:
    for host, kind in (("http://127.0.0.1:1/v1", ConnectionFailed), (guarded_server.openai_host, KeyRefused)):
        with pytest.raises(kind):
            choose_model(open_target(host, OPENAI), "theirs")


@pytest.mark.parametrize(
    ("host", "base_url"),
    [
        ("http://h:9000", "http://h:9000/v1"),
        ("http://h:9000/", "http://h:9000/v1"),
        ("http://h:9000/v1", "http://h:9000/v1"),
        ("https://h/v1beta/openai", "https://h/v1beta/openai"),
        ("http://h:3000/api/", "http://h:3000/api"),
    ],
)
def test_an_openai_api_that_is_said_to_be_one_is_asked_at_the_path_that_was_given(host: str, base_url: str) -> None:
    assert resolve(host, OPENAI) == resolve(base_url, OPENAI) == (OPENAI, base_url)


def test_an_openai_api_that_was_found_is_asked_where_it_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_protocol", lambda _: OPENAI)
    assert resolve("http://h:9000/prefix") == (OPENAI, "http://h:9000/prefix/v1")
    with pytest.raises(BadInput, match="over http://"):
        resolve("h:9000", OPENAI)


def test_the_limits_reach_both_clients() -> None:
    for host, protocol in (("h:8001", TRITON), ("http://h/v1", OPENAI)):
        with pytest.raises(InvalidCall, match="timeout_s must be above 0"):
            open_target(host, protocol, timeout_s=0)
