"""Sampling parameters are read strictly, and the sampler draws what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.engine.errors import InvalidRequest
from stillhouse.engine.request import Request
from stillhouse.engine.sampler import choose
from stillhouse.engine.sampling import SamplingParams, StructuredOutputs, parse_params


def test_values_may_be_strings_as_in_tritons_vllm_backend() -> None:
    params = parse_params(
        {"temperature": "0.1", "top_p": "0.95", "max_tokens": "100", "ignore_eos": "true", "stop": '["a"]'}
    )
    assert params.temperature == 0.1
    assert params.max_tokens == 100
    assert params.ignore_eos is True


def test_null_takes_the_default() -> None:
    assert parse_params({"temperature": None, "seed": None}) == SamplingParams()


def test_of_the_forms_of_an_answer_those_that_are_null_are_not_given() -> None:
    asked = {"json": None, "choice": ["left", "right"], "regex": None}
    assert parse_params({"structured_outputs": asked}).structured_outputs == StructuredOutputs(
        "choice", ["left", "right"]
    )


@pytest.mark.parametrize(
    ("given_params", "named"),
    [
        ({"temprature": 1}, "unknown sampling parameter 'temprature'"),
        ({"temperature": -0.1}, "temperature must be between 0 and 100, got -0.1"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"temperature": True}, "temperature must be a number"),
        ({"max_tokens": 0}, "max_tokens must be at least 1 and at most 2147483647, got 0"),
        ({"max_tokens": 10**4299}, "max_tokens must be at least 1 and at most 2147483647, got 1000"),
        ({"min_tokens": 2**31}, "min_tokens must be at least 0 and at most 2147483647"),
        ({"thinking_token_budget": 2**31}, "thinking_token_budget must be at least 0 and at most 2147483647"),
        ({"top_k": 2**31}, "top_k must be -1, 0"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number, got 1.5"),
        ({"max_tokens": [1]}, "max_tokens must be a whole number"),
        ({"max_tokens": float("inf")}, "max_tokens must be a whole number"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_k": -2}, "top_k must be"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens must be at most max_tokens"),
        ({"stop": [1]}, "stop must be a string or a list of strings"),
        ({"stop": [""]}, "stop must be a list of non-empty strings"),
        ({"stop_token_ids": "x"}, "stop_token_ids must be JSON"),
        ({"logit_bias": {"3": 101}}, "logit_bias must be"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20"),
        ({"ignore_eos": "maybe"}, "ignore_eos must be true or false"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": 1e300}, "repetition_penalty must be above 0"),
        ({"stop": ["x"] * 257}, "stop must be a list of non-empty strings, 256 at most"),
        ({"stop": ["x" * 4000, "y" * 97]}, "stop must be a list of non-empty strings, 256 at most and 4096 characters"),
        ({"stop_token_ids": [1] * 257}, "stop_token_ids must be a list of token ids, 256 at most"),
        ({"logit_bias": {str(token): 1 for token in range(4097)}}, "logit_bias must be at most 4096 token ids"),
        ({"stop_token_ids": "[" * 100_000}, "stop_token_ids must be JSON"),
        ({"stop_token_ids": "[" + "9" * 5000 + "]"}, "stop_token_ids must be JSON"),
        ({"max_tokens": "1_0"}, "max_tokens must be a whole number, got '1_0'"),
        ({"max_tokens": "9" * 5000}, "max_tokens must be a whole number"),
        ({"seed": "٥"}, "seed must be a whole number"),
        ({"temperature": " 1"}, "temperature must be a number, got ' 1'"),
        ({"temperature": "1_0.0"}, "temperature must be a number"),
        ({"temperature": "inf"}, "temperature must be a number"),
        ({"logit_bias": {" 5 ": 1}}, "logit_bias must be a whole number, got ' 5 '"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias must name each token id once"),
        ({"structured_outputs": {"json": None}}, "structured_outputs must be an object with one of"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name_and_range(given_params: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named.replace("(", r"\(")):
        parse_params(given_params)


@pytest.mark.parametrize("name", ["temperature", "seed", "stop", "logit_bias", "structured_outputs", "x" * 10**6])
def test_an_error_shows_a_value_in_short_however_long_or_deep_it_is(name: str) -> None:
    deep: list[object] = []
    for _ in range(50_000):
        deep = [deep]
    for value in (deep, ["x" * 10**6] * 10**5):
        with pytest.raises(InvalidRequest) as refused:
            parse_params({name: value})
        assert len(str(refused.value)) < 500


def draw_many(logits: list[float], count: int = 4000, **params: object) -> np.ndarray:
    request = Request("r", [1], SamplingParams(max_tokens=count, seed=3, **params), lambda _: None)  # type: ignore[arg-type]
    row = np.asarray([logits], np.float32)
    drawn = [choose(row, [request], frozenset())[0].token_id for _ in range(count)]
    return np.bincount(drawn, minlength=len(logits)) / count


def test_frequencies_follow_the_softmax() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    expected = np.exp(logits) / np.exp(logits).sum()
    assert draw_many(logits) == pytest.approx(expected, abs=0.03)


def test_temperature_flattens_and_sharpens() -> None:
    logits = [0.0, 2.0]
    assert draw_many(logits, temperature=100.0) == pytest.approx([0.5, 0.5], abs=0.03)
    assert draw_many(logits, temperature=0.01)[1] == 1.0


def test_top_k_top_p_and_min_p_cut_the_tail() -> None:
    logits = list(np.log([0.5, 0.3, 0.15, 0.05]))
    assert (draw_many(logits, top_k=2) > 0).tolist() == [True, True, False, False]
    assert (draw_many(logits, top_p=0.79) > 0).tolist() == [True, True, False, False]
    assert (draw_many(logits, top_p=0.81) > 0).tolist() == [True, True, True, False]
    assert (draw_many(logits, min_p=0.31) > 0).tolist() == [True, True, False, False]
    assert (draw_many(logits, top_p=1e-9) > 0).tolist() == [True, False, False, False]


def test_a_bias_comes_before_the_penalties_as_in_vllm() -> None:
    """A repetition penalty of 2 halves what the bias has made of a logit: (1 + 6) / 2 = 3.5, and not 1 / 2 + 6."""
    row = np.asarray([[0.0, 1.0, 4.0]], np.float32)
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, logit_bias={1: 6.0})
    assert choose(row, [Request("r", [1], params, lambda _: None)], frozenset())[0].token_id == 2
    assert choose(row, [Request("r", [0], params, lambda _: None)], frozenset())[0].token_id == 1


def test_the_nucleus_of_a_large_vocabulary_is_exact() -> None:
    """The shortcut over the heaviest tokens gives what sorting everything gives."""
    from stillhouse.engine.sampler import _nucleus

    weights = np.random.default_rng(0).random(5000) ** 3
    ids = np.arange(5000)
    for top_p in (0.01, 0.3, 0.9, 0.999):
        order = np.argsort(-weights, kind="stable")
        mass = np.cumsum(weights[order])
        expected = set(order[: int(np.searchsorted(mass, top_p * weights.sum())) + 1].tolist())
        assert set(_nucleus(weights, ids, top_p).tolist()) == expected


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=50))
def test_logprobs_are_those_of_the_model_and_greedy_takes_the_largest(logits: list[float]) -> None:
    params = SamplingParams(temperature=0.0, logprobs=1)
    row = np.asarray([logits], np.float32)
    choice = choose(row, [Request("r", [1], params, lambda _: None)], frozenset())[0]
    assert choice.token_id == int(row.argmax())
    assert choice.logprob is not None
    exact = row[0].astype(np.float64)
    assert choice.logprob == pytest.approx(
        exact.max() - np.log(np.exp(exact - exact.max()).sum()) - exact.max(), abs=1e-6
    )
    assert choice.top_logprobs is not None
    assert max(choice.top_logprobs.values()) == pytest.approx(choice.logprob)


def test_bias_and_penalties_move_the_choice() -> None:
    row = np.asarray([[1.0, 0.9, 0.0]], np.float32)

    def pick(output: list[int], **params: object) -> int | None:
        request = Request("r", [2], SamplingParams(temperature=0.0, **params), lambda _: None)  # type: ignore[arg-type]
        request.output_ids = output
        return choose(row, [request], frozenset())[0].token_id

    assert pick([]) == 0
    assert pick([], logit_bias={0: -5.0}) == 1
    assert pick([0], presence_penalty=0.5) == 1
    assert pick([0, 0], frequency_penalty=0.1) == 1
    assert pick([0], repetition_penalty=1.5) == 1
