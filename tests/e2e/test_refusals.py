"""What a server does with bad requests: an error that names what is wrong, with the code that fits."""

from __future__ import annotations

from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from stillhouse.serve.launcher import Server

pytestmark = pytest.mark.triton

BAD = [
    ({"text_input": ""}, "text_input is empty"),
    ({"sampling_parameters": "{}"}, "exactly one of text_input, messages, input_ids"),
    ({"text_input": "a", "sampling_parameters": '{"temperatur": 1}'}, "unknown sampling parameter 'temperatur'"),
    ({"text_input": "a", "sampling_parameters": '{"temperature": "hot"}'}, "temperature must be a number"),
    ({"text_input": "a", "sampling_parameters": '{"temperature": NaN}'}, "temperature must be a finite number"),
    ({"text_input": "a", "sampling_parameters": '{"max_tokens": 0}'}, "max_tokens must be at least 1"),
    ({"text_input": "a", "sampling_parameters": "nonsense"}, "sampling_parameters must be JSON"),
    ({"messages": '[{"content": "a"}]'}, "messages[0]"),
    ({"text_input": "a " * 9000}, "the context holds"),
    (
        {"text_input": "a", "stream": True, "exclude_input_in_output": False},
        "When streaming, `exclude_input_in_output` = False is not allowed.",
    ),
]


@pytest.mark.parametrize(("tensors", "words"), BAD)
def test_over_http_it_is_a_400_by_name(post: Any, tensors: dict[str, Any], words: str) -> None:
    for action in ("generate", "generate_stream"):
        status, answer = post(action, tensors)
        assert (status, words in answer["error"]) == (400, True), answer


@pytest.mark.parametrize(("tensors", "words"), BAD)
def test_over_grpc_it_is_an_error_by_name(
    triton: Server, open_stream: Any, tensors: dict[str, Any], words: str
) -> None:
    with open_stream(triton, "support-int4", tensors) as opened, pytest.raises(InferenceServerException) as refused:
        opened.next()
    assert words in refused.value.message()


def test_after_all_of_them_the_model_answers(post: Any) -> None:
    assert post("generate", {"text_input": "Hello", "max_tokens": 1})[0] == 200
