"""Models that think aloud between <think> and </think> before they answer: where their thoughts begin and end, and a
budget for them.

Tags are found in the text of tokens, not in their ids: tokenizers join their ends with what stands beside them
(Qwen2.5's have `.</` and `>` with line breaks as one token each).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stillhouse.engine.text import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
# A tag has no more tokens than characters, and templates write a few line breaks behind it.
_PROMPT_END_TOKENS = len(CLOSE) + 4


@dataclass(frozen=True, slots=True)
class ThinkingTags:
    """How a tokenizer writes the tags: the ids of the opening and of the closing one, one or several each.

    `straddling`: tokens that are the end of a tag and the beginning of what follows it in one.
    """

    tokenizer: Tokenizer
    start: tuple[int, ...]
    end: tuple[int, ...]
    straddling: tuple[int, ...]

    def text(self, token_id: int) -> str:
        """What a token is in an answer's text; of the special ones only the tags are any."""
        return self.tokenizer.decode([token_id], skip_special_tokens=token_id not in (self.start[0], self.end[0]))

    def hidden(self, *, skip_special_tokens: bool) -> dict[int, str]:
        """The tags that an answer's text lacks, because they are special tokens: id → tag."""
        tags = ((self.start, OPEN), (self.end, CLOSE))
        special = self.tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        return {ids[0]: tag for ids, tag in tags if len(ids) == 1 and ids[0] in special}


def thinking_tags(tokenizer: Tokenizer) -> ThinkingTags | None:
    """The tags of a model that thinks: its vocabulary has a token for each, or its chat template writes them."""
    start, end = (tuple(tokenizer.encode(tag, add_special_tokens=False)) for tag in (OPEN, CLOSE))
    if len(start) == len(end) == 1:
        tags = ThinkingTags(tokenizer, start, end, ())
    elif tokenizer.template_mentions(CLOSE):
        begun = tokenizer.ids_beginning_with(CLOSE[-1])
        tags = ThinkingTags(tokenizer, start, end, tuple(i for i in begun if tokenizer.decode([i])[1:].strip()))
    else:
        return None
    # A vocabulary that cannot even spell them (it has an <unk> for what it lacks) is not a thinker's.
    spelt = OPEN in "".join(map(tags.text, start)) and CLOSE in "".join(map(tags.text, end))
    return tags if spelt else None


def opens_thinking(prompt_ids: Sequence[int], tags: ThinkingTags) -> bool:
    """Whether the prompt ends in an open tag, so that the answer begins with thoughts.

    Line breaks may follow the tag. What stands before the prompt's end does not count: a user may write about the tag,
    and an answer that was cut in its thoughts may be part of the conversation.
    """
    return _ending(prompt_ids, tags).endswith(OPEN)


class Thinking:
    """Follows one answer in and out of its thoughts, counts them, and says when the end tag must be forced.

    The prompt may open the tag already, as the chat templates of R1-Distill models do. Otherwise the answer may begin
    with it; behind the first word of content a tag is text like any other. Tags themselves do not count.
    """

    def __init__(self, tags: ThinkingTags, prompt_ids: Sequence[int], budget_tokens: int | None) -> None:
        self.tags = tags
        self._budget_tokens = budget_tokens
        # The last tokens' texts, and whether each counts as thought; joined they may be a tag, or begin one.
        self._tail: list[tuple[str, bool]] = []
        self._forced: list[int] = []
        self._answering = False  # content has begun: there will be no more thoughts
        self.tokens = 0
        ending = _ending(prompt_ids, tags)
        self.inside = ending.endswith(OPEN)
        # The token by which the model may open its thoughts itself; None: the prompt has opened them, or ends behind
        # a closed tag, as templates do that switch thinking off.
        self.opening_id = None if ending.endswith((OPEN, CLOSE)) else tags.start[0]

    @property
    def straddling_ids(self) -> Sequence[int]:
        """The tokens that would end the thoughts now, and begin the answer in one."""
        closing = self.inside and self._text().endswith(CLOSE[:-1])
        return self.tags.straddling if closing else ()

    def open(self) -> None:
        """The answer begins with `opening_id`: what follows is the rest of the tag, and then thoughts."""
        self.inside = True
        self._forced = list(self.tags.start[1:])

    def forced_token(self) -> int | None:
        """The token that must come next, whatever the model would say; None: the model is free."""
        if not self._forced and self.inside and self._budget_tokens is not None and self.tokens >= self._budget_tokens:
            self._forced = list(self.tags.end)
        return self._forced[0] if self._forced else None

    def push(self, token_id: int) -> None:
        """Takes note of the token that was chosen."""
        if self._answering:
            return
        counts = self.inside and not self._forced
        self.tokens += counts
        if self._forced:
            self._forced.pop(0)
        self._tail.append((self.tags.text(token_id), counts))
        if self.inside:
            self._look_for_the_end()
        else:
            self._look_for_the_beginning()

    def _look_for_the_end(self) -> None:
        before, found, after = self._text().partition(CLOSE)
        if not found:
            self._tail = self._tail[-len(CLOSE) :]
            return
        # A token that is only in part the tag's has some thought in it.
        begins = itertools.accumulate((len(text) for text, _ in self._tail), initial=0)
        self.tokens -= sum(
            counts for (text, counts), at in zip(self._tail, begins, strict=False) if text and at >= len(before)
        )
        self.inside, self._tail = False, [(after, False)]

    def _look_for_the_beginning(self) -> None:
        text = self._text().lstrip("\n")
        if text.startswith(OPEN):
            self.inside, self._tail = True, [(text.removeprefix(OPEN), False)]
        elif OPEN.startswith(text):
            self._tail = [(text, False)]
        else:
            self._answering = True

    def _text(self) -> str:
        return "".join(text for text, _ in self._tail)


def _ending(prompt_ids: Sequence[int], tags: ThinkingTags) -> str:
    """The last of the prompt, without the white space behind it."""
    return tags.tokenizer.decode(prompt_ids[-_PROMPT_END_TOKENS:], skip_special_tokens=False).rstrip()
