from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from stillhouse.engine.errors import InvalidRequest, PromptTooLong
from stillhouse.engine.sampling import SamplingParams, StructuredOutputs
from stillhouse.serve.tensors import MAX_IDS, MAX_JSON_CHARACTERS, Question, read_question


def strings(*values: str | bytes) -> np.ndarray:
    return np.array([value.encode() if isinstance(value, str) else value for value in values], dtype=np.object_)


def read(parameters: dict[str, Any] | None = None, **tensors: Any) -> Question:
    arrays = {
        name: value
        if isinstance(value, np.ndarray)
        else np.array([value])
        if isinstance(value, bool)
        else strings(value)
        for name, value in tensors.items()
    }
    return read_question(arrays.get, json.dumps(parameters or {}))


def test_the_defaults_are_those_of_the_vllm_backend() -> None:
    question = read(text_input="Hello")
    assert question.text == "Hello"
    assert not question.stream
    assert question.repeats_prompt
    assert (question.params.max_tokens, question.params.temperature) == (16, 1.0)
    assert question.returns == frozenset()


def test_sampling_parameters_may_be_strings_in_json() -> None:
    question = read(
        text_input="Hello", sampling_parameters='{"temperature": "0.1", "top_p": "0.95", "max_tokens": "100"}'
    )
    assert (question.params.temperature, question.params.top_p, question.params.max_tokens) == (0.1, 0.95, 100)


def test_request_parameters_are_sampling_parameters_and_the_tensor_goes_before_them() -> None:
    question = read({"temperature": 0, "max_tokens": 5}, text_input="Hello", sampling_parameters='{"max_tokens": 7}')
    assert (question.params.temperature, question.params.max_tokens) == (0.0, 7)


def test_a_request_parameter_called_like_a_flag_stands_for_it_and_the_tensor_goes_before_it() -> None:
    assert read({"stream": True}, text_input="Hello").stream
    assert not read({"stream": True}, text_input="Hello", stream=False).stream


def test_parameters_that_triton_adds_for_itself_are_not_sampling_parameters() -> None:
    assert read({"triton_enable_empty_final_response": True}, text_input="Hello").text == "Hello"


@pytest.mark.parametrize(
    ("tensors", "repeats"),
    [
        ({}, True),
        ({"stream": True}, False),
        ({"exclude_input_in_output": True}, False),
        ({"exclude_input_in_output": False}, True),
        ({"stream": True, "exclude_input_in_output": True}, False),
    ],
)
def test_the_prompt_is_repeated_as_in_the_vllm_backend(tensors: dict[str, bool], repeats: bool) -> None:
    assert read(text_input="Hello", **tensors).repeats_prompt is repeats


def test_streaming_with_the_prompt_repeated_is_refused_in_the_vllm_backends_words() -> None:
    with pytest.raises(InvalidRequest, match="When streaming, `exclude_input_in_output` = False is not allowed"):
        read(text_input="Hello", stream=True, exclude_input_in_output=False)


def test_messages_and_ids_are_not_repeated_unless_asked_for() -> None:
    assert not read(messages='[{"role": "user", "content": "Hi"}]').repeats_prompt
    assert not read(input_ids=np.array([1, 2], np.int32)).repeats_prompt
    assert read(input_ids=np.array([1, 2], np.int32), exclude_input_in_output=False).repeats_prompt


def test_messages_are_json_and_ids_are_numbers() -> None:
    assert read(messages='[{"role": "user", "content": "Hi"}]').messages == [{"role": "user", "content": "Hi"}]
    assert read(input_ids=np.array([[5, 7]], np.int32)).input_ids == [5, 7]


def test_extra_outputs_come_only_when_asked_for() -> None:
    question = read(text_input="Hello", return_finish_reason=True, return_logprobs=False, return_num_input_tokens=True)
    assert question.returns == {"finish_reason", "num_input_tokens"}


def test_a_cumulative_logprob_makes_the_engine_keep_logprobs_that_the_caller_did_not_ask_for() -> None:
    question = read(text_input="Hello", return_cumulative_logprob=True)
    assert question.params.logprobs == 0
    assert not question.logprobs_asked
    assert read({"logprobs": 3}, text_input="Hello", return_cumulative_logprob=True).params.logprobs == 3


def test_what_the_vllm_backend_takes_and_what_is_so_anyway_is_taken() -> None:
    given = {"n": "3", "best_of": "1", "use_beam_search": "false", "length_penalty": 1.0, "detokenize": True}
    question = read({"early_stopping": False}, text_input="Hello", sampling_parameters=json.dumps(given))
    assert question.params == SamplingParams(n=3)
    guided = {"choice": ["left", "right"], "json": None, "backend": "xgrammar", "disable_fallback": False}
    for sent in (guided, json.dumps(guided)):
        question = read(text_input="Hello", sampling_parameters=json.dumps({"guided_decoding": sent}))
        assert question.params.structured_outputs == StructuredOutputs("choice", ["left", "right"])


def test_the_shortest_of_the_time_outs_holds() -> None:
    assert read(text_input="Hello").timeout_s is None
    assert read({"timeout": 1_500_000}, text_input="Hello").timeout_s == 1.5
    assert read({"timeout": 0}, text_input="Hello").timeout_s is None
    given = {"timeout_s": "2.5", "max_tokens": 3}
    assert read(text_input="Hello", sampling_parameters=json.dumps(given)).timeout_s == 2.5
    arrays = {"text_input": strings("Hello")}
    assert read_question(arrays.get, '{"timeout_s": 9}', 250_000).timeout_s == 0.25


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"text_input": "a", "sampling_parameters": '{"timeout_s": 0}'}, "timeout_s must be above 0"),
        # Triton's, in microseconds, is none of the sampling parameters: whoever writes it there means seconds.
        ({"text_input": "a", "sampling_parameters": '{"timeout": 30}'}, "unknown sampling parameter 'timeout'"),
        ({"text_input": "a", "sampling_parameters": '{"timeout_s": "soon"}'}, "timeout_s must be a number"),
        ({"text_input": "a", "sampling_parameters": '{"priority": 0.5}'}, "priority must be a whole number"),
        ({}, "exactly one of text_input, messages, input_ids must be given, got none"),
        ({"text_input": "a", "messages": "[]"}, "got text_input and messages"),
        ({"text_input": ""}, "text_input is empty"),
        ({"text_input": b"\xff\xfe"}, "text_input must be UTF-8: byte 0"),
        ({"text_input": strings("a", "b")}, "text_input must hold one string, got 2"),
        ({"messages": "hello"}, "messages must be JSON"),
        ({"messages": '{"role": "user"}'}, "messages must be a JSON list"),
        ({"messages": "[" * 100_000}, "messages must be JSON"),
        ({"input_ids": np.array([], np.int32)}, "input_ids is empty"),
        ({"text_input": "a", "sampling_parameters": "max_tokens=5"}, "sampling_parameters must be JSON"),
        ({"text_input": "a", "sampling_parameters": "[1]"}, "sampling_parameters must be a JSON object"),
        ({"text_input": "a", "sampling_parameters": '{"beams": 4}'}, "unknown sampling parameter 'beams'"),
        ({"text_input": "a", "sampling_parameters": '{"top_p": 2}'}, "top_p must be above 0 and at most 1"),
        ({"text_input": "a", "sampling_parameters": '{"max_tokens": "many"}'}, "max_tokens must be a whole number"),
        ({"text_input": "a", "sampling_parameters": '{"best_of": 3}'}, "best_of is not supported here, got 3"),
        ({"text_input": "a", "sampling_parameters": '{"use_beam_search": "true"}'}, "use_beam_search is not supported"),
        ({"text_input": "a", "sampling_parameters": '{"guided_decoding": 5}'}, "guided_decoding must be an object"),
        ({"text_input": "a", "sampling_parameters": '{"n": 0}'}, "n must be between 1 and 128"),
        ({"text_input": "a", "sampling_parameters": '{"probe": 3}'}, "probe must be true or false"),
        ({"text_input": "a", "stream": np.array([True, False])}, "stream must hold one boolean"),
    ],
)
def test_what_is_wrong_is_refused_by_name(tensors: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(**tensors)
    assert words in str(refused.value)


@pytest.mark.parametrize("name", ["messages", "sampling_parameters", "request parameters"])
def test_json_of_many_megabytes_is_refused_unread(name: str) -> None:
    large = "[" * (MAX_JSON_CHARACTERS + 1)  # which reading would find broken
    sent = {"text_input": strings("a"), "sampling_parameters": strings(large)}
    if name == "messages":
        sent = {"messages": strings(large)}
    with pytest.raises(
        InvalidRequest, match=f"{name} has 4194305 characters of JSON, at most 4194304 are read"
    ) as said:
        read_question(sent.get, large if name == "request parameters" else "")
    assert isinstance(said.value, PromptTooLong) is (name == "messages")


def test_more_ids_than_any_context_holds_are_refused_before_they_become_a_list() -> None:
    class Ids:
        size = MAX_IDS + 1

    with pytest.raises(PromptTooLong, match="input_ids holds 1048577 token ids, at most 1048576 are read"):
        read_question({"input_ids": Ids()}.get, "")  # type: ignore[arg-type]


def test_an_unknown_or_ill_typed_request_parameter_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="unknown sampling parameter 'colour'"):
        read({"colour": "red"}, text_input="a")
    with pytest.raises(InvalidRequest, match="stream must be true or false, got 3"):
        read({"stream": 3}, text_input="a")


def test_the_number_of_a_request_is_no_sampling_parameter() -> None:
    tensors = {"text_input": np.array([b"Hi"], np.object_)}
    assert read_question(tensors.get, '{"id": "7", "max_tokens": 3}').params.max_tokens == 3
