"""A Triton model that is not ours: the inputs of Triton's own vLLM backend, which takes a text and no messages."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.loadtest import target as module
from stillhouse.loadtest.target import open_target

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
