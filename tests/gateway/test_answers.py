"""Several answers at once: those of a request that has been let in are all made, the others are refused at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import pytest

from stillhouse.engine.answer import Chunk
from stillhouse.engine.errors import QueueFull
from stillhouse.gateway import answers
from stillhouse.gateway.app import written
from stillhouse.gateway.generator import ServedModel


class Engine:
    """Has room for so many answers, and refuses more, both a moment after it is asked."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.refused = 0

    async def stream(self, number: int) -> AsyncGenerator[Chunk, None]:
        await asyncio.sleep(0.001)
        if not self.room:
            self.refused += 1
            raise QueueFull("it is full")
        self.room -= 1
        try:
            await asyncio.sleep(0.02)
            yield Chunk(f"{number}", (5,), 1, 1, "stop")
        finally:
            self.room += 1


async def ask(engine: Engine, count: int, together: int = 32) -> list[tuple[int, str]]:
    streams = [partial(engine.stream, number) for number in range(count)]
    return sorted([(number, chunk.text) async for number, chunk in answers.merged(streams, together)])


@pytest.mark.parametrize("room", [1, 2, 5])
async def test_a_request_of_which_a_part_was_let_in_is_answered_whole(room: int) -> None:
    engine = Engine(room)
    assert await ask(engine, 5) == [(number, f"{number}") for number in range(5)]
    assert bool(engine.refused) is (room < 5)


async def test_two_requests_share_what_room_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_AGAIN_S", 0.01)
    engine = Engine(2)
    both = await asyncio.gather(ask(engine, 4), ask(engine, 4), return_exceptions=True)
    whole = [(number, f"{number}") for number in range(4)]
    # Whoever was let in with none of its answers is refused.
    assert whole in both
    assert all(of == whole or isinstance(of, QueueFull) for of in both)


@pytest.mark.parametrize("count", [1, 4])
async def test_a_request_of_which_nothing_is_let_in_is_refused_at_once(count: int) -> None:
    engine = Engine(0)
    with pytest.raises(QueueFull):
        await asyncio.wait_for(ask(engine, count), 0.5)
    assert engine.refused == count


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "together"), [(10, 6, 32), (60, 40, 20), (60, 2000, 4), (490, 12, 4)]
)
def test_one_request_asks_for_as_many_answers_at_a_time_as_find_a_slot_and_room_in_the_cache(
    prompt_tokens: int, max_tokens: int, together: int
) -> None:
    other: Any = dict.fromkeys(["tokenizer", "default_params", "thinking_tags"])
    numbers = {"created_s": 0, "max_prompt_bytes": 1, "vocab_size": 1}
    model = ServedModel("m", 1, max_model_len=500, slots=32, kv_capacity_tokens=2000, **numbers, **other)
    assert model.answers_together(prompt_tokens, max_tokens) == together


async def test_others_are_served_between_the_choices_of_an_answer_that_is_written() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    said = {"id": 'a"choices": []', "choices": [{"index": index, "text": "é"} for index in range(9)], "usage": {"n": 1}}
    serving = asyncio.create_task(other())
    text = await written(said)
    serving.cancel()
    assert turns >= 9
    assert text == json.dumps(said, ensure_ascii=False)
