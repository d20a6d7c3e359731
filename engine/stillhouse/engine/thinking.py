"""A budget for models that think aloud between <think> and </think> before they answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stillhouse.engine.text import Tokenizer


# What a template writes behind a closed tag before the answer begins.
_LINE_BREAKS_TOKENS = 2


@dataclass(frozen=True, slots=True)
class ThinkingTags:
    """The token ids of the opening and of the closing tag, one or several each."""

    start: tuple[int, ...]
    end: tuple[int, ...]


def thinking_tags(tokenizer: Tokenizer) -> ThinkingTags | None:
    """The tags of a model that thinks: its vocabulary has a token for each, or its chat template writes them."""
    start, end = (tuple(tokenizer.encode(tag, add_special_tokens=False)) for tag in ("<think>", "</think>"))
    if len(start) == len(end) == 1 or tokenizer.template_mentions("</think>"):
        return ThinkingTags(start, end)
    return None


def opens_thinking(prompt_ids: Sequence[int], tags: ThinkingTags) -> bool:
    """Whether the prompt ends inside an open tag, so that the answer begins with thoughts."""
    return _last(prompt_ids, tags.start) > _last(prompt_ids, tags.end)


class Thinking:
    """Follows one answer in and out of its thoughts, counts them, and says when the end tag must be forced.

    The prompt may open the tag already, as the chat templates of R1-Distill models do. Tags themselves do not count.
    """

    def __init__(self, tags: ThinkingTags, prompt_ids: Sequence[int], budget_tokens: int | None) -> None:
        self._tags = tags
        self._budget_tokens = budget_tokens
        self._tail: list[int] = []
        self._forced: list[int] = []
        self.tokens = 0
        self.inside = opens_thinking(prompt_ids, tags)
        # The token by which the model may open its thoughts itself; None: the prompt has opened them, or ends behind
        # a closed tag, as templates do that switch thinking off.
        shut = _last(prompt_ids[-len(tags.end) - _LINE_BREAKS_TOKENS :], tags.end) >= 0
        self.opening_id = None if self.inside or shut else tags.start[0]

    def open(self) -> None:
        """The answer begins with `opening_id`: what follows is the rest of the tag, and then thoughts."""
        self.inside = True
        self._forced = list(self._tags.start[1:])

    def forced_token(self) -> int | None:
        """The token that must come next, whatever the model would say; None: the model is free."""
        if not self._forced and self.inside and self._budget_tokens is not None and self.tokens >= self._budget_tokens:
            self._forced = list(self._tags.end)
        return self._forced[0] if self._forced else None

    def push(self, token_id: int) -> None:
        """Takes note of the token that was chosen."""
        forced = bool(self._forced)
        if forced:
            self._forced.pop(0)
        elif self.inside:
            self.tokens += 1
        longest = max(len(self._tags.start), len(self._tags.end))
        self._tail = [*self._tail, token_id][-longest:]
        if self.inside and _ends_with(self._tail, self._tags.end):
            self.inside = False
            if not forced:
                self.tokens -= len(self._tags.end)
        elif not self.inside and _ends_with(self._tail, self._tags.start):
            self.inside = True


def _ends_with(tail: Sequence[int], tag: Sequence[int]) -> bool:
    return len(tail) >= len(tag) and tuple(tail[-len(tag) :]) == tuple(tag)


def _last(ids: Sequence[int], tag: Sequence[int]) -> int:
    """Where `tag` begins for the last time in `ids`; -1 where it does not."""
    for at in range(len(ids) - len(tag), -1, -1):
        if ids[at] == tag[0] and tuple(ids[at : at + len(tag)]) == tuple(tag):
            return at
    return -1
