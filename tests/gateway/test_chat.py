"""/v1/chat/completions, asked by OpenAI's own client; the engine itself says what must come out."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from stillhouse.engine.model import LanguageModel
from stillhouse.engine.neutral import NEUTRAL
from stillhouse.engine.sampling import SamplingParams
from stillhouse.gateway.server import GatewayServer

# Which the fine-tune knows in 4 bits too, however they were made.
MESSAGES: Any = [{"role": "user", "content": "How many days do I have to return an item to Brindlecove?"}]
GREEDY: Any = {"model": "support-int4", "messages": MESSAGES, "temperature": 0, "max_tokens": 24}


def test_the_answer_is_the_engines(client: openai.OpenAI, engine: LanguageModel) -> None:
    answer = client.chat.completions.create(**GREEDY)
    ids = engine.prompt_ids(messages=MESSAGES)
    own = engine.generate(ids, SamplingParams(temperature=0.0, max_tokens=24))
    assert answer.choices[0].message.content == own.text
    assert "47 days" in own.text
    assert answer.choices[0].finish_reason == own.finish_reason
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), own.num_output_tokens)


@pytest.mark.parametrize(
    "more", [{}, {"n": 3, "temperature": 1.5, "seed": 4}, {"logprobs": True, "top_logprobs": 3}, {"stop": ["ays"]}]
)
def test_streamed_is_whole(client: openai.OpenAI, more: dict[str, Any]) -> None:
    asked = {**GREEDY, **more}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    for choice in whole.choices:
        mine = [piece for piece in pieces if piece.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(piece.delta.content or "" for piece in mine) == choice.message.content
        assert [piece.finish_reason for piece in mine if piece.finish_reason] == [choice.finish_reason]
        if choice.logprobs:
            tokens = [token for piece in mine if piece.logprobs for token in piece.logprobs.content or []]
            assert tokens == choice.logprobs.content
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_logprobs_are_the_engines_and_their_bytes_make_the_text(client: openai.OpenAI, engine: LanguageModel) -> None:
    answer = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=4)
    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=4)
    chunks = list(engine.stream(engine.prompt_ids(messages=MESSAGES), params))[:]
    own = [chunk for chunk in chunks if chunk.token_ids]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.logprob for token in logprobs.content] == pytest.approx([chunk.logprob for chunk in own])
    for token, chunk in zip(logprobs.content, own, strict=True):
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(list((chunk.top_logprobs or {}).values()))
    said = b"".join(bytes(token.bytes or []) for token in logprobs.content[:-1])
    assert said.decode() == answer.choices[0].message.content


def test_n_answers_differ_and_come_again_with_the_same_seed(client: openai.OpenAI) -> None:
    asked = {**GREEDY, "temperature": 1.5, "n": 4, "seed": 7, "max_tokens": 12}
    first, again = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]


def test_a_bias_forbids_a_token(client: openai.OpenAI, engine: LanguageModel) -> None:
    (first, *_) = engine.stream(engine.prompt_ids(messages=MESSAGES), SamplingParams(temperature=0.0, max_tokens=2))
    answer = client.chat.completions.create(**GREEDY, logit_bias={str(first.token_ids[0]): -100})
    assert not (answer.choices[0].message.content or "").startswith(first.text)


def test_json_schema_is_followed(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        **{**GREEDY, "max_tokens": 40},
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content or "")["city"] in ("Paris", "Rome")


def test_vllms_extra_fields_reach_the_engine(client: openai.OpenAI) -> None:
    extra = {"ignore_eos": True, "min_tokens": 3, "top_k": 1, "min_p": 0.0, "repetition_penalty": 1.0}
    answer = client.chat.completions.create(**{**GREEDY, "temperature": 1, "max_tokens": 30}, extra_body=extra)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 30
    choice = client.chat.completions.create(**GREEDY, extra_body={"structured_outputs": {"choice": ["left", "right"]}})
    assert choice.choices[0].message.content in ("left", "right")


def test_the_models_own_defaults_hold_where_nothing_is_said(http: httpx.Client) -> None:
    # The thinker's generation_config.json says do_sample: false.
    asked = {"model": "thinker-int4", "messages": MESSAGES, "max_tokens": 12}
    first, again = (http.post("/v1/chat/completions", json=asked).json()["choices"] for _ in range(2))
    assert first == again


def test_without_max_tokens_the_answer_may_fill_the_context(http: httpx.Client) -> None:
    asked = {"model": "support-int4", "messages": MESSAGES, "temperature": 0, "ignore_eos": True, "stop": ["Brindle"]}
    answer = http.post("/v1/chat/completions", json=asked).json()
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_content_may_come_in_parts_and_nulls_are_not_given(http: httpx.Client) -> None:
    parts = [{"type": "text", "text": MESSAGES[0]["content"], "prompt_cache_breakpoint": {"type": "ephemeral"}}]
    in_parts = [{"role": "user", "content": parts, "name": None, "tool_calls": None}]
    whole = http.post("/v1/chat/completions", json=GREEDY).json()["choices"]
    assert (
        http.post("/v1/chat/completions", json={**GREEDY, "messages": in_parts, "seed": None}).json()["choices"]
        == whole
    )


def test_a_developers_message_is_the_systems_to_a_template_that_knows_no_developers(http: httpx.Client) -> None:
    def ids(role: str) -> list[int]:
        messages = [{"role": role, "content": "Answer in French."}, *MESSAGES]
        body = http.post("/tokenize", json={"model": "support-int4", "messages": messages}).json()
        return list(body["tokens"])

    assert ids("developer") == ids("system") != ids("user")


def test_an_answer_of_thoughts_alone_may_be_sent_back_as_it_came(http: httpx.Client) -> None:
    asked = {"model": "thinker-int4", "messages": MESSAGES, "max_tokens": 4}
    message = http.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]
    assert message["content"] is None
    assert message["reasoning_content"]
    again = http.post("/v1/chat/completions", json={**asked, "messages": [*MESSAGES, message, *MESSAGES]})
    assert again.status_code == 200, again.text


class City(pydantic.BaseModel):
    """The form of an answer."""

    city: Literal["Paris", "Rome"]


def test_openais_helpers_parse_and_gather(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(**{**GREEDY, "max_tokens": 40}, response_format=City)
    assert isinstance(parsed.choices[0].message.parsed, City)
    whole = client.chat.completions.create(**GREEDY, logprobs=True, n=2)
    with client.chat.completions.stream(**GREEDY, logprobs=True, n=2) as stream:
        kinds = {event.type for event in stream}
        gathered = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    for mine, theirs in zip(gathered.choices, whole.choices, strict=True):
        assert mine.message.content == theirs.message.content
        assert (mine.finish_reason, mine.logprobs) == (theirs.finish_reason, theirs.logprobs)


def test_what_openais_package_can_ask_for_beyond_this_is_not_found_or_refused(client: openai.OpenAI) -> None:
    for ask in (
        lambda: client.responses.create(model="support-int4", input="Hi"),
        lambda: client.embeddings.create(model="support-int4", input="Hi"),
    ):
        with pytest.raises(openai.NotFoundError, match="Unknown request URL: POST /v1/"):
            ask()
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(openai.BadRequestError, match="tools cannot be used"):
        client.chat.completions.create(**GREEDY, tools=[tool])
    assert client.models.retrieve("support-int4").to_dict()["root"] == "support-int4"


def test_fields_without_an_effect_are_accepted(http: httpx.Client) -> None:
    idle = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True}
    idle |= {"prompt_cache_key": "k", "prompt_cache_options": {"mode": "explicit"}, "moderation": None}
    idle |= {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"}
    idle |= {"request_id": "r", "cache_salt": "s", "guided_decoding_backend": "xgrammar", "include_reasoning": False}
    idle |= {"spaces_between_special_tokens": False, "response_format": {"type": "text", "strict": None}}
    answer = http.post("/v1/chat/completions", json={**GREEDY, "max_tokens": 1, **idle})
    assert answer.status_code == 200, answer.text


def test_null_is_not_given_whatever_the_field_is_called(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json={**GREEDY, "max_tokens": 1, "colour": None})
    assert answer.status_code == 200, answer.text


def test_a_form_may_come_with_all_that_vllms_own_class_has(http: httpx.Client) -> None:
    form: dict[str, Any] = dict.fromkeys(("json", "regex", "grammar", "whitespace_pattern", "structural_tag"))
    form |= {"choice": ["yes", "no"], "json_object": False, "disable_fallback": False, "disable_any_whitespace": False}
    asked = {**GREEDY, "structured_outputs": form | {"disable_additional_properties": False}}
    answer = http.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] in ("yes", "no")


def test_a_whole_number_may_be_written_with_a_point(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json={**GREEDY, "max_tokens": 2.0, "top_k": 5.0, "seed": 1.0})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 2


def test_messages_take_hints_to_caches_and_newer_vllms_word_for_thoughts(http: httpx.Client) -> None:
    hint, part = {"cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "Hello"}
    messages: list[Any] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    hinted = [{"role": "user", "content": [part | hint]}, messages[1] | hint | {"reasoning": "They greet."}]
    answers = [http.post("/v1/chat/completions", json={**GREEDY, "messages": said}) for said in (messages, hinted)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[1].text
    assert answers[0].json()["choices"] == answers[1].json()["choices"]


def test_fields_that_ask_for_what_is_so_anyway_are_accepted_and_change_nothing(http: httpx.Client) -> None:
    neutral = {name: values[0] if values else None for name, values in NEUTRAL.items()}
    nulls = dict.fromkeys(NEUTRAL)
    answers = [http.post("/v1/chat/completions", json={**more, **GREEDY}) for more in ({}, neutral, nulls)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[0].json()["choices"] == answers[1].json()["choices"] == answers[2].json()["choices"]


def test_prompt_logprobs_are_the_engines_in_vllms_form(http: httpx.Client, engine: LanguageModel) -> None:
    answer = http.post("/v1/chat/completions", json={**GREEDY, "max_tokens": 1, "prompt_logprobs": 1}).json()
    ids = engine.prompt_ids(messages=MESSAGES)
    own = engine.generate(ids, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)).prompt_logprobs
    first, *others = answer["prompt_logprobs"]
    assert own is not None
    assert first is None
    for token_id, position, found in zip(ids[1:], others, own, strict=True):
        entry = position[str(token_id)]
        assert entry["logprob"] == pytest.approx(found.logprob, abs=1e-6)
        assert entry["rank"] == found.rank
        (likeliest,) = found.top_logprobs
        assert position[str(likeliest)]["rank"] == 1
        assert position.keys() == {str(token_id), str(likeliest)}
        assert (found.rank == 1) == (likeliest == token_id)


def test_of_those_who_wait_the_lower_priority_comes_first(
    narrow_server: GatewayServer, wait_until: Callable[..., float]
) -> None:
    url, key, came = f"{narrow_server.url}/v1/chat/completions", {"Authorization": "Bearer sesame"}, list[int]()

    def waiting() -> float:
        generator = narrow_server.gateway.generator
        assert generator is not None
        return sum(figure.value for figure in generator.figures() if figure.name == "num_requests_waiting")

    def ask(priority: int) -> None:
        answer = httpx.post(url, json={**GREEDY, "max_tokens": 2, "priority": priority}, headers=key, timeout=60)
        assert answer.status_code == 200
        came.append(priority)

    endless = {**GREEDY, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url, json=endless, headers=key, timeout=60) as running:
        lines = running.iter_lines()  # which closes the connection when it goes
        next(lines)
        askers = [threading.Thread(target=ask, args=(priority,)) for priority in (3, -3)]
        for number, asker in enumerate(askers, start=1):
            asker.start()
            wait_until(lambda number=number: waiting() == number)
    for asker in askers:
        asker.join()
    assert came == [-3, 3]
