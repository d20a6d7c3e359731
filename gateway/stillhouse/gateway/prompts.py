"""Texts to token ids, where a large one does not hold up the other requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from stillhouse.gateway.errors import invalid
from stillhouse.gateway.generator import ServedModel
from stillhouse.gateway.messages import check_variables, ready_messages

_LARGE_CHARACTERS = 4096  # a few milliseconds of tokenizing; more is done on a thread
_PER_ITEM_CHARACTERS = 16  # what a template makes of an empty item of a list or an object
_CHECKED_IDS = 16  # checking so many takes no longer than reading a character

T = TypeVar("T")


async def chat_ids(
    model: ServedModel,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any] | None,
    *,
    add_generation_prompt: bool = True,
    add_special_tokens: bool = False,
) -> list[int]:
    """Token ids of a conversation; the template has put in the special tokens, so none are added by default."""

    def encode() -> list[int]:
        ready = ready_messages(messages, model)
        check_variables(variables)
        text = model.tokenizer.render_chat(ready, add_generation_prompt=add_generation_prompt, variables=variables)
        return _encoded(model, text, add_special_tokens=add_special_tokens)

    return await aside(encode, _characters([messages, variables]))


async def text_ids(model: ServedModel, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of plain texts."""

    def encode() -> list[list[int]]:
        return [_encoded(model, text, add_special_tokens=add_special_tokens) for text in texts]

    return await aside(encode, sum(map(len, texts)))


async def given_ids(model: ServedModel, prompts: Sequence[Sequence[int]], place: str) -> list[list[int]]:
    """The ids themselves. Raises ApiError for one that is not in the vocabulary."""

    def check() -> list[list[int]]:
        return [checked_ids(model, ids, place) for ids in prompts]

    return await aside(check, sum(map(len, prompts)) // _CHECKED_IDS)


async def texts_of(model: ServedModel, prompts: Sequence[Sequence[int]]) -> list[str]:
    """What the ids say, special tokens too."""

    def decode() -> list[str]:
        return [model.tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts]

    return await aside(decode, sum(map(len, prompts)))


async def aside(work: Callable[[], T], characters: int) -> T:
    """What `work` returns; where it reads so many characters that the other requests would notice, on a thread."""
    if characters < _LARGE_CHARACTERS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)


def checked_ids(model: ServedModel, ids: Sequence[int], place: str) -> list[int]:
    """The ids themselves. Raises ApiError for one that is not in the vocabulary."""
    if wrong := [token for token in ids if token >= model.vocab_size]:
        raise invalid(f"{place}: token id {wrong[0]} is not in the vocabulary of {model.vocab_size} tokens", place)
    return list(ids)


def _encoded(model: ServedModel, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text that may fit the context: reading megabytes of one that cannot would take seconds."""
    if len(text) > model.max_prompt_bytes:
        raise invalid(
            f"This model's maximum context length is {model.max_model_len} tokens, or {model.max_prompt_bytes}"
            f" bytes of text at most. However, you sent {len(text)} characters. Please reduce the length of it.",
            code="context_length_exceeded",
        )
    return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _characters(value: Any) -> int:
    """How much text JSON holds, and its template makes of it; counted no further than to what is large."""
    count, unseen = 0, [value]
    while unseen and count < _LARGE_CHARACTERS:
        value = unseen.pop()
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, (list, dict)):
            count += _PER_ITEM_CHARACTERS * len(value)
            if count < _LARGE_CHARACTERS:
                unseen += value if isinstance(value, list) else [*value.keys(), *value.values()]
    return count
