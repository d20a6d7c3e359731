"""What a large request costs is paid on a thread, so that the others are served meanwhile; a small one needs none."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.engine.answer import Chunk
from stillhouse.engine.sampling import SamplingParams
from stillhouse.gateway import completions, prompts
from stillhouse.gateway.bodies import CompletionBody
from stillhouse.gateway.completions import completion, completion_job
from stillhouse.gateway.errors import ApiError
from stillhouse.gateway.gateway import Gateway
from stillhouse.gateway.generator import ServedModel
from stillhouse.gateway.logprobs import Vocabulary
from stillhouse.gateway.metrics import Meter
from stillhouse.gateway.prompts import chat_ids, given_ids, text_ids


class Tokenizer:
    """Notes on which threads it is asked."""

    byte_ids = frozenset[int]()

    def __init__(self) -> None:
        self.threads = set[threading.Thread]()
        self.asked = 0

    def render_chat(self, messages: list[Any], **_: Any) -> str:
        return self._noted("".join(message["content"] for message in messages))

    def encode(self, text: str, **_: Any) -> list[int]:
        return self._noted([5] * max(1, len(text) // 1000))

    def decode(self, ids: list[int], **_: Any) -> str:
        return self._noted("a" * len(ids))

    def token(self, token_id: int) -> str:
        return self._noted(f"{token_id}")

    def _noted(self, value: Any) -> Any:
        self.threads.add(threading.current_thread())
        self.asked += 1
        return value


def model_of(tokenizer: Any) -> ServedModel:
    return ServedModel("m", 1, 0, 200_000, 4, 800_000, 2**24, 100, tokenizer, SamplingParams(), None)


EMPTY = {"role": "user", "content": ""}
SMALL = [EMPTY | {"content": "Hi"}]


@pytest.mark.parametrize(
    ("messages", "variables"),
    [
        ([EMPTY] * 300, None),
        ([EMPTY | {"content": "a" * 5000}], None),
        ([EMPTY | {"content": [{"type": "text", "text": "a"}] * 300}], None),
        (SMALL, {"tools": ["a" * 5000]}),
        (SMALL, {"tools": {f"{number}": {} for number in range(300)}}),
        (SMALL, {"a" * 5000: None}),
    ],
)
async def test_a_large_conversation_is_checked_and_read_on_a_thread(
    monkeypatch: pytest.MonkeyPatch, messages: list[Any], variables: dict[str, Any] | None
) -> None:
    tokenizer = Tokenizer()
    ready = prompts.ready_messages

    def noted(*given: Any) -> Any:
        tokenizer.threads.add(threading.current_thread())
        return ready(*given)

    monkeypatch.setattr(prompts, "ready_messages", noted)
    await chat_ids(model_of(tokenizer), messages, variables)
    assert len(tokenizer.threads) == 1
    assert threading.current_thread() not in tokenizer.threads


async def test_a_small_conversation_is_read_where_it_comes() -> None:
    tokenizer = Tokenizer()
    await chat_ids(model_of(tokenizer), [*SMALL, EMPTY | {"content": "a" * 3800}], {"enable_thinking": False})
    assert tokenizer.threads == {threading.current_thread()}


async def test_what_is_wrong_with_a_large_conversation_is_named_all_the_same() -> None:
    with pytest.raises(ApiError, match=r"messages\.300\.role must be one of") as refused:
        await chat_ids(model_of(Tokenizer()), [*[EMPTY] * 300, {"content": ""}], None)
    assert refused.value.param == "messages.300.role"


async def test_many_token_ids_are_checked_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = list[threading.Thread]()

    def noted(_: Any, ids: Any, __: str) -> list[int]:
        threads.append(threading.current_thread())
        return list(ids)

    monkeypatch.setattr(prompts, "checked_ids", noted)
    model = model_of(Tokenizer())
    await given_ids(model, [[5] * 1000] * 8, "prompt")
    assert set(threads) == {threading.current_thread()}
    threads.clear()
    await given_ids(model, [[5] * 100_000], "prompt")
    assert threading.current_thread() not in threads
    monkeypatch.undo()
    with pytest.raises(ApiError, match="token id 100 is not in the vocabulary"):
        await given_ids(model, [[5] * 100_000, [100]], "prompt")


async def test_long_texts_are_read_on_a_thread() -> None:
    for text, aside in (("a" * 4000, False), ("a" * 5000, True)):
        tokenizer = Tokenizer()
        await text_ids(model_of(tokenizer), [text])
        assert (threading.current_thread() not in tokenizer.threads) is aside


class Generator:
    """Gives every prompt one token."""

    async def stream(self, _: Any, prompt_ids: Any, __: Any) -> AsyncGenerator[Chunk, None]:
        yield Chunk("b", (7,), len(prompt_ids), 1, "stop")


@pytest.mark.parametrize(("count", "aside"), [(3, False), (500, True)])
async def test_the_echo_of_many_token_ids_is_decoded_on_a_thread(count: int, aside: bool) -> None:
    tokenizer, generator = Tokenizer(), Generator()
    body = CompletionBody(model="m", prompt=[[5] * 10] * count, echo=True)
    job = await completion_job(generator, model_of(tokenizer), Meter(Gateway().metrics), body)  # type: ignore[arg-type]
    answer = await completion(job, body)
    assert [choice["text"] for choice in answer["choices"]] == ["a" * 10 + "b"] * count
    assert (threading.current_thread() not in tokenizer.threads) is aside


def test_more_prompts_than_are_answered_are_counted_before_they_are_looked_at() -> None:
    body: Any = SimpleNamespace(prompt=[""] * (completions.MAX_ANSWERS + 1), n=None)
    with pytest.raises(ApiError, match="more than 4096 answers"):
        completions.given_prompts(body)


def test_what_a_token_is_called_is_looked_up_once_however_many_requests_ask() -> None:
    tokenizer: Any = Tokenizer()
    for _ in range(3):
        vocabulary = Vocabulary(tokenizer, as_ids=False)
        assert [vocabulary.name(7), vocabulary.entry(7, -1.0)["token"]] == ["a", "a"]
    assert tokenizer.asked == 2
