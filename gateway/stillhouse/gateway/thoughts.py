"""Splits an answer as it comes into what is between <think> and </think>, and the rest."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.engine.answer import Chunk
from stillhouse.engine.sampling import SamplingParams
from stillhouse.engine.text import overlap
from stillhouse.engine.thinking import CLOSE, OPEN, opens_thinking
from stillhouse.gateway.generator import ServedModel


class Thoughts:
    """Takes text in pieces of any size; the tags belong to neither part, nor do the line breaks beside them.

    `inside`: the prompt has opened the tag already; a model that opens it once more is not taken at its word. Thoughts
    come first: once content has begun a tag is text like any other, as it is to the engine.
    """

    def __init__(self, *, inside: bool) -> None:
        self._inside = inside
        self._may_reopen = inside
        self._answering = False  # content has begun
        self._held = ""  # may be the beginning of a tag, or a line break before one
        self._fresh = inside  # nothing has followed the last tag yet

    def push(self, piece: str) -> tuple[str, str]:
        """The (thoughts, content) that `piece` makes certain."""
        rest, thoughts = self._held + piece, ""
        self._held = ""
        while rest and not self._answering:
            if self._inside:
                more, rest = self._think(rest)
                thoughts += more
            else:
                rest = self._begin(rest)
        return thoughts, self._trimmed(rest)

    def awaits(self, tag: str) -> bool:
        """Whether `tag` would be one now, and not text."""
        if self._inside:
            return tag == CLOSE or self._may_reopen
        return tag == OPEN and not self._answering

    def flush(self) -> tuple[str, str]:
        """What was held back, as it is."""
        held, self._held = self._trimmed(self._held), ""
        return (held, "") if self._inside else ("", held)

    def _think(self, text: str) -> tuple[str, str]:
        """The thoughts that `text` begins with, and what is behind them; what is not certain yet is held back."""
        if self._may_reopen:
            begin = text.lstrip("\n")
            if len(begin) < len(OPEN) and OPEN.startswith(begin):
                self._held = text
                return "", ""
            self._may_reopen, text = False, begin.removeprefix(OPEN)
        before, tag, after = text.partition(CLOSE)
        if tag:
            thoughts = self._trimmed(before.rstrip("\n"))
            self._inside, self._fresh = False, True
            return thoughts, after
        safe = text[: len(text) - overlap(text, CLOSE)].rstrip("\n")
        self._held = text[len(safe) :]
        return self._trimmed(safe), ""

    def _begin(self, text: str) -> str:
        """What is left of `text` when it is certain whether thoughts or content begin; until then it is held back."""
        begin = text.lstrip("\n")
        if begin.startswith(OPEN):
            self._inside, self._fresh = True, True
            return begin.removeprefix(OPEN)
        if OPEN.startswith(begin):
            self._held = text
            return ""
        self._answering = True
        return text

    def _trimmed(self, text: str) -> str:
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        return text


class Splitter:
    """The same over an answer's chunks; of a model that does not think everything is content."""

    def __init__(self, model: ServedModel, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        tags = model.thinking_tags
        self._thoughts = Thoughts(inside=opens_thinking(prompt_ids, tags)) if tags else None
        # Tags that are special tokens are left out of the text: they are put in again.
        self._hidden = tags.hidden(skip_special_tokens=params.skip_special_tokens) if tags else {}

    def push(self, chunk: Chunk) -> tuple[str, str]:
        """The (thoughts, content) of a chunk; with the last one also what was held back."""
        if self._thoughts is None:
            return "", chunk.text
        parts = [self._thoughts.push(chunk.text)]
        # The text that comes with such a tag was held back before it.
        tag = self._hidden.get(chunk.token_ids[0]) if chunk.token_ids else None
        if tag is not None and self._thoughts.awaits(tag):
            parts.append(self._thoughts.push(tag))
        if chunk.finish_reason is not None:
            parts.append(self._thoughts.flush())
        return "".join(part[0] for part in parts), "".join(part[1] for part in parts)
