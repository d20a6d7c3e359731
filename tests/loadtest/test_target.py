"""A Triton model that is not ours: the inputs of Triton's own vLLM backend, which takes a text and no messages."""

from __future__ import annotations

from typing import Any

import pytest

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
