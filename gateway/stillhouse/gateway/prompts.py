"""Texts to token ids, where a large one does not hold up the other requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from stillhouse.gateway.errors import invalid
from stillhouse.gateway.generator import ServedModel
from stillhouse.gateway.messages import check_variables, ready_messages

_LARGE_CHARACTERS = 4096  # a few milliseconds of tokenizing; more is done on a thread
_PER_MESSAGE_CHARACTERS = 64  # what a template makes of an empty one

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
    ready = ready_messages(messages, model)
    check_variables(variables)

    def encode() -> list[int]:
        text = model.tokenizer.render_chat(ready, add_generation_prompt=add_generation_prompt, variables=variables)
        return _encoded(model, text, add_special_tokens=add_special_tokens)

    return await _aside(encode, sum(len(message["content"]) + _PER_MESSAGE_CHARACTERS for message in ready))


async def text_ids(model: ServedModel, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of plain texts."""

    def encode() -> list[list[int]]:
        return [_encoded(model, text, add_special_tokens=add_special_tokens) for text in texts]

    return await _aside(encode, sum(map(len, texts)))


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


async def _aside(work: Callable[[], T], characters: int) -> T:
    if characters < _LARGE_CHARACTERS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)
