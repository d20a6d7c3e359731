from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from stillhouse.client import (
    ClientError,
    ConnectionFailed,
    RequestRejected,
    StreamBroken,
    TimedOut,
    Token,
    Unavailable,
)
from stillhouse.client.assembly import Assembly
from stillhouse.client.errors import from_server
from stillhouse.client.request import Limits
from stillhouse.client.types import Reply, Request
from stillhouse.engine.errors import DeadlineExceeded, StillhouseError
from stillhouse.engine.model import Chunk
from stillhouse.engine.request import PromptLogprob
from stillhouse.engine.sampling import SamplingParams, StructuredOutputs, parse_params
from stillhouse.gateway import errors
from stillhouse.serve.answers import answer_tensors
from stillhouse.serve.errors import KINDS, kind_and_line
from stillhouse.serve.tensors import EXTRA_OUTPUTS, Question
from stillhouse.serve.translating import chunks_of, engine_error, sampling_fields

CHUNKS = [
    Chunk(" Par", (11,), 5, 1, logprob=-0.5, top_logprobs={11: -0.5, 12: -2.0}, cumulative_logprob=-0.5),
    Chunk("is", (13,), 5, 2, "stop", logprob=-3.0, top_logprobs={14: -0.1, 15: -2.5}, cumulative_logprob=-3.5),
]


def question(*returns: str, logprobs_asked: bool = True) -> Question:
    return Question(
        text="The capital is",
        messages=None,
        input_ids=None,
        stream=False,
        repeats_prompt=True,
        params=SamplingParams(logprobs=2),
        logprobs_asked=logprobs_asked,
        returns=frozenset(returns),
    )


def answer(chunks: list[Chunk], *returns: str, prompt: str = "", logprobs_asked: bool = True) -> dict[str, Any]:
    asked = question(*returns, logprobs_asked=logprobs_asked)
    return answer_tensors(asked, [chunks], [chunks[-1]], prompt, lambda token: f"<{token}>")


def test_only_the_text_comes_unasked_and_the_prompt_goes_before_it() -> None:
    tensors = answer(CHUNKS, prompt="The capital is")
    assert list(tensors) == ["text_output"]
    assert tensors["text_output"][0] == b"The capital is Paris"


def test_a_part_of_the_answer_carries_its_own_text_and_counts_and_the_sums_so_far() -> None:
    first, second = (answer([chunk], *EXTRA_OUTPUTS) for chunk in CHUNKS)
    assert (first["text_output"][0], second["text_output"][0]) == (b" Par", b"is")
    assert (first["finish_reason"][0], second["finish_reason"][0]) == (b"None", b"stop")
    assert (first["num_output_tokens"][0], second["num_output_tokens"][0]) == (1, 1)
    assert second["cumulative_logprob"][0] == np.float32(-3.5)


def test_the_types_are_those_of_the_vllm_backend() -> None:
    tensors = answer(CHUNKS, *EXTRA_OUTPUTS)
    assert tensors["num_input_tokens"].dtype == np.uint32
    assert tensors["num_output_tokens"].dtype == np.uint32
    assert tensors["cumulative_logprob"].dtype == np.float32
    assert {name: array.shape for name, array in tensors.items()} == dict.fromkeys(tensors, (1,))


def test_logprobs_are_json_with_rank_and_text_and_always_hold_the_sampled_token() -> None:
    first, second = json.loads(answer(CHUNKS, "logprobs")["logprobs"][0])
    assert first["11"] == {"logprob": -0.5, "rank": 1, "decoded_token": "<11>"}
    assert first["12"]["rank"] == 2
    assert second["13"] == {"logprob": -3.0, "rank": 3, "decoded_token": "<13>"}


def test_logprobs_that_were_not_asked_for_are_null() -> None:
    assert answer(CHUNKS, "logprobs", logprobs_asked=False)["logprobs"][0] == b"null"


def test_of_several_answers_each_has_its_own_element_and_what_it_has_so_far() -> None:
    second = Chunk("No", (21,), 5, 1, "length", logprob=-1.0, top_logprobs={}, cumulative_logprob=-1.0, index=1)
    parts, asked = [[CHUNKS[0]], [], []], question(*EXTRA_OUTPUTS)
    tensors = answer_tensors(asked, parts, [CHUNKS[0], second, None], "", lambda token: f"<{token}>")
    assert tensors["text_output"].tolist() == [b" Par", b"", b""]
    assert tensors["finish_reason"].tolist() == [b"None", b"length", b"None"]
    assert tensors["cumulative_logprob"].tolist() == [-0.5, -1.0, 0.0]
    assert tensors["num_output_tokens"].tolist() == [1, 0, 0]
    assert tensors["num_input_tokens"].tolist() == [5]
    assert [len(json.loads(text)) for text in tensors["logprobs"]] == [1, 0, 0]
    assert [json.loads(text) for text in tensors["details"]][1:] == [None, None]


def token_of(chunks: list[Chunk]) -> Token:
    """What the client makes of the response with these chunks."""
    tensors = answer(chunks, "details")
    text = tensors["text_output"][0].decode()
    return Token(text, 0, 0.0, None, None, None, None, details=json.loads(tensors["details"][0]))


def test_details_bring_the_engines_chunks_to_the_gateway() -> None:
    prompt = [PromptLogprob(3, -1.5, {4: -0.25}, 2), PromptLogprob(5, -0.5, {5: -0.5}, 1)]
    with_all = Chunk(
        "x", (7,), 3, 1, None, None, -0.5, {7: -0.5, 8: -2.0}, 1, prompt_logprobs=prompt, num_thinking_tokens=1
    )
    plain, ending = Chunk("y", (9,), 3, 2), Chunk("z", (), 3, 2, "stop", num_thinking_tokens=2)
    for chunk in (with_all, plain, ending):
        assert list(chunks_of(token_of([chunk]))) == [chunk]
    first, second = chunks_of(token_of([with_all, Chunk("y", (9,), 3, 2, "length", None, -1.0, {9: -1.0}, 1)]))
    assert (first.text, first.token_ids, first.logprob, first.num_output_tokens) == ("", (7,), -0.5, 1)
    assert (second.text, second.token_ids, second.logprob, second.finish_reason) == ("xy", (9,), -1.0, "length")
    assert (first.prompt_logprobs, second.prompt_logprobs) == (prompt, None)


def test_parameters_arrive_as_they_were_sent() -> None:
    params = SamplingParams(
        max_tokens=5,
        temperature=0.0,
        seed=2**63,
        stop=("a", "b"),
        stop_token_ids=(3,),
        logit_bias={5: -1.5},
        prompt_logprobs=0,
        priority=-1,
        structured_outputs=StructuredOutputs("json", {"type": "object"}),
    )
    assert parse_params(json.loads(json.dumps(sampling_fields(params)))) == params
    assert sampling_fields(SamplingParams()) == {}


@pytest.mark.parametrize(
    ("met", "meant"),
    [
        (RequestRejected("m: unexpected inference input"), StillhouseError),
        (Unavailable("m: Stub process is not healthy"), errors.Unavailable),
        (ConnectionFailed("cannot reach 10.0.0.7:8001: Connection refused"), errors.Unavailable),
        (StreamBroken("the stream broke after 3 tokens: cannot reach 10.0.0.7:8001"), errors.Unavailable),
        (TimedOut("m: no answer in time"), DeadlineExceeded),
    ],
)
def test_what_triton_or_the_way_to_it_says_is_no_fault_of_the_request(
    met: ClientError, meant: type[StillhouseError]
) -> None:
    error = engine_error(met, "m")
    assert type(error) is meant
    assert not str(error).startswith("m: ")
    assert "10.0.0.7" not in str(error), "Triton's address"


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_engines_error_comes_out_as_it_went_in_whatever_its_text_says_and_how_far_the_answer_had_come(
    kind: type[StillhouseError], begun: bool
) -> None:
    text = "m: internal error (not finite: the context holds 3 requests are waiting; unknown model, no answer within"
    assembly = Assembly(Request("m", "", {}, stream=True), Limits(None, None))
    if begun:
        assembly.add(Reply("a", None, None, 1, None, 0.0))
    met = assembly.broken(from_server(kind_and_line(kind(text, hint="mend it")), "m"))
    assert isinstance(met, StreamBroken) == (begun and kind is not DeadlineExceeded)
    error = engine_error(met, "m")
    assert type(error) is kind
    assert str(error) == f"{text} (mend it)"
