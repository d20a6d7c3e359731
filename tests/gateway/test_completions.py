"""/v1/completions and what lm-eval needs of it: echoed prompts with their log-probabilities."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from stillhouse.engine.model import LanguageModel
from stillhouse.engine.sampling import SamplingParams, parse_params
from stillhouse.gateway import params
from stillhouse.gateway.server import GatewayServer

PROMPTS = ["The capital of France is", "Water boils at", "Once upon a time"]
GREEDY: Any = {"model": "support-int4", "temperature": 0, "max_tokens": 6}


def test_several_prompts_get_their_own_answers_in_order(client: openai.OpenAI, engine: LanguageModel) -> None:
    answer = client.completions.create(**GREEDY, prompt=PROMPTS, n=2)
    params = SamplingParams(temperature=0.0, max_tokens=GREEDY["max_tokens"])
    own = [engine.generate(engine.prompt_ids(text=prompt), params).text for prompt in PROMPTS]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [text for text in own for _ in range(2)]


def test_token_ids_are_answered_like_their_text(client: openai.OpenAI, engine: LanguageModel) -> None:
    ids = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]
    as_text = client.completions.create(**GREEDY, prompt=PROMPTS)
    as_lists = client.completions.create(**GREEDY, prompt=ids)
    as_list = client.completions.create(**GREEDY, prompt=ids[0])
    assert [choice.text for choice in as_lists.choices] == [choice.text for choice in as_text.choices]
    assert as_list.choices[0].text == as_text.choices[0].text


def test_more_prompt_logprobs_than_memory_should_hold_are_refused(http: httpx.Client) -> None:
    body = {"model": "support-int4", "prompt": [[1] * 500] * 100, "max_tokens": 0, "echo": True, "logprobs": 20}
    refused = http.post("/v1/completions", json=body)
    assert refused.status_code == 400
    assert "1,050,000 log-probabilities, more than 1,048,576" in refused.json()["error"]["message"]


@pytest.mark.parametrize("max_tokens", [1, 0])
def test_an_echo_brings_the_engines_own_prompt_logprobs(
    http: httpx.Client, engine: LanguageModel, max_tokens: int
) -> None:
    ids = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]
    body = {"model": "support-int4", "prompt": ids, "max_tokens": max_tokens, "echo": True, "logprobs": 1}
    answer = http.post("/v1/completions", json=body | {"temperature": 0, "seed": 1234}).json()
    for prompt, choice in zip(PROMPTS, answer["choices"], strict=True):
        prompt_ids, logprobs = engine.tokenizer.encode(prompt), choice["logprobs"]
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1, prompt_logprobs=1)
        (chunk,) = [c for c in engine.stream(prompt_ids, params) if c.token_ids]
        assert chunk.prompt_logprobs is not None
        own = [found.logprob for found in chunk.prompt_logprobs] + [chunk.logprob] * max_tokens
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == pytest.approx(own)
        assert choice["text"].startswith(prompt)
        assert "".join(logprobs["tokens"]) == choice["text"]
        offsets = [len("".join(logprobs["tokens"][:place])) for place in range(len(logprobs["tokens"]))]
        assert logprobs["text_offset"] == offsets
        # lm-eval's test of greediness: the token is the likeliest of those listed.
        for found, value, top in zip(
            chunk.prompt_logprobs, logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=False
        ):
            greedy = max(found.top_logprobs.values()) == found.logprob
            assert (value == max(top.values())) == greedy
    assert answer["usage"]["completion_tokens"] == 3 * max_tokens


def test_prompt_logprobs_and_an_echo_each_have_as_many_as_they_asked_for(http: httpx.Client) -> None:
    asked = {**GREEDY, "prompt": PROMPTS[:2], "max_tokens": 1, "echo": True, "logprobs": 0, "prompt_logprobs": 3}
    for choice in http.post("/v1/completions", json=asked).json()["choices"]:
        first, *others = choice["prompt_logprobs"]
        assert first is None
        assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1] * (len(others) + 1)
        for position, value in zip(others, choice["logprobs"]["token_logprobs"][1:], strict=False):
            assert len(position) in (3, 4)
            assert {entry["rank"] for entry in position.values()} >= {1, 2, 3}
            assert value in [entry["logprob"] for entry in position.values()]


@pytest.mark.parametrize("more", [{}, {"logprobs": 2}, {"echo": True, "logprobs": 0}, {"echo": True}])
def test_streamed_is_whole(client: openai.OpenAI, more: dict[str, Any]) -> None:
    asked = {**GREEDY, "prompt": PROMPTS, **more}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    for choice in whole.choices:
        mine = [piece for piece in pieces if piece.index == choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason
        if choice.logprobs:
            for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
                parts = [getattr(piece.logprobs, name) for piece in mine if piece.logprobs]
                assert [value for part in parts for value in part] == getattr(choice.logprobs, name)
    assert chunks[-1].usage == whole.usage


def test_more_prompts_than_run_together_are_answered(http: httpx.Client) -> None:
    body = {"model": "support-int4", "prompt": ["a"] * 80, "max_tokens": 1, "temperature": 0}
    answer = http.post("/v1/completions", json=body).json()
    assert len(answer["choices"]) == 80
    assert len({choice["text"] for choice in answer["choices"]}) == 1


def test_a_batch_is_answered_however_short_the_queue_is(narrow_server: GatewayServer) -> None:
    body = {"model": "support-int4", "prompt": ["a"] * 9, "max_tokens": 1, "temperature": 0}
    key = {"Authorization": "Bearer sesame"}
    answer = httpx.post(f"{narrow_server.url}/v1/completions", json=body, headers=key, timeout=60)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 9


def test_the_parameters_are_read_once_however_many_prompts_there_are(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[Any]()

    def noted(*given: Any) -> SamplingParams:
        read.append(given)
        return parse_params(*given)

    monkeypatch.setattr(params, "parse_params", noted)
    body = {"model": "support-int4", "prompt": ["a", "b", "c"], "max_tokens": 1, "logit_bias": {"5": 1}, "n": 2}
    assert len(http.post("/v1/completions", json=body).json()["choices"]) == 6
    assert len(read) == 1


def test_the_longest_of_the_prompts_has_to_leave_room(http: httpx.Client) -> None:
    body = {"model": "support-int4", "prompt": [[5], [5] * 500, [5]], "max_tokens": 13}
    refused = http.post("/v1/completions", json=body)
    assert "513 tokens (500 in the prompt, 13 for the completion)" in refused.json()["error"]["message"]


def test_tokenize_and_detokenize_are_the_engines(http: httpx.Client, engine: LanguageModel) -> None:
    for prompt in PROMPTS:
        made = http.post(
            "/tokenize", json={"model": "support-int4", "prompt": prompt, "return_token_strs": True}
        ).json()
        assert made["tokens"] == engine.tokenizer.encode(prompt)
        assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
        back = http.post("/detokenize", json={"model": "support-int4", "tokens": made["tokens"]})
        assert back.json() == {"prompt": prompt}
    messages = [{"role": "user", "content": "Hello"}]
    chat = http.post("/tokenize", json={"model": "support-int4", "messages": messages}).json()
    assert chat["tokens"] == engine.prompt_ids(messages=messages)
    assert chat["max_model_len"] == 512


def test_to_tokenize_takes_neutral_fields_as_to_answer_does(http: httpx.Client) -> None:
    asked = {"model": "support-int4", "messages": [{"role": "user", "content": "Hello"}]}
    answers = [
        http.post("/tokenize", json=asked | more) for more in ({}, {"continue_final_message": False, "tools": []})
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    refused = http.post("/tokenize", json=asked | {"continue_final_message": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "continue_final_message")
    back = http.post("/detokenize", json={"model": "support-int4", "tokens": [5], "request_id": None})
    assert back.status_code == 200


def test_what_the_tokenizer_is_may_be_asked(http: httpx.Client, engine: LanguageModel) -> None:
    info = http.get("/tokenizer_info", params={"model": "support-int4"}).json()
    assert info["eos_token"] == engine.tokenizer.special_texts["eos_token"]
    assert "messages" in info["chat_template"]
    unnamed = http.post("/tokenize", json={"prompt": "a"})
    assert unnamed.status_code == 400, "there are two models"
    assert unnamed.json()["error"]["param"] == "model"
