"""Splits an answer as it comes into what is between <think> and </think>, and the rest."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.engine.answer import Chunk
from stillhouse.engine.text import Tokenizer, overlap
from stillhouse.engine.thinking import opens_thinking
from stillhouse.gateway.generator import ServedModel

OPEN, CLOSE = "<think>", "</think>"


class Thoughts:
    """Takes text in pieces of any size; the tags belong to neither part, nor do the line breaks beside them.

    `inside`: the prompt has opened the tag already; a model that opens it once more is not taken at its word.
    """

    def __init__(self, *, inside: bool) -> None:
        self._inside = inside
        self._may_reopen = inside
        self._held = ""  # may be the beginning of a tag, or a line break before one
        self._fresh = inside  # nothing has followed the last tag yet

    def push(self, piece: str) -> tuple[str, str]:
        """The (thoughts, content) that `piece` makes certain."""
        text, found = self._held + piece, {True: "", False: ""}
        if self._may_reopen:
            begin = text.lstrip("\n")
            if len(begin) < len(OPEN) and OPEN.startswith(begin):
                self._held = text
                return "", ""
            self._may_reopen, text = False, begin.removeprefix(OPEN)
        while True:
            tag = CLOSE if self._inside else OPEN
            before, hit, after = text.partition(tag)
            if not hit:
                break
            found[self._inside] += self._trimmed(before).rstrip("\n") if self._inside else self._trimmed(before)
            self._inside, self._fresh, text = not self._inside, True, after
        keep = overlap(text, tag)
        safe = text[: len(text) - keep]
        if self._inside:
            safe = safe.rstrip("\n")
        self._held = text[len(safe) :]
        found[self._inside] += self._trimmed(safe)
        return found[True], found[False]

    def flush(self) -> tuple[str, str]:
        """What was held back, as it is."""
        held, self._held = self._trimmed(self._held), ""
        return (held, "") if self._inside else ("", held)

    def _trimmed(self, text: str) -> str:
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        return text


class Splitter:
    """The same over an answer's chunks; of a model that does not think everything is content."""

    def __init__(self, model: ServedModel, prompt_ids: Sequence[int]) -> None:
        tags = model.thinking_tags
        self._thoughts = Thoughts(inside=opens_thinking(prompt_ids, tags)) if tags else None
        # Tags that are special tokens are left out of the text: they are put in again.
        self._hidden = {} if tags is None else _hidden(model.tokenizer, {OPEN: tags.start, CLOSE: tags.end})

    def push(self, chunk: Chunk) -> tuple[str, str]:
        """The (thoughts, content) of a chunk; with the last one also what was held back."""
        if self._thoughts is None:
            return "", chunk.text
        tag = self._hidden.get(chunk.token_ids[0], "") if chunk.token_ids else ""
        thoughts, content = self._thoughts.push(tag + chunk.text)
        if chunk.finish_reason is not None:
            more_thoughts, more_content = self._thoughts.flush()
            return thoughts + more_thoughts, content + more_content
        return thoughts, content


def _hidden(tokenizer: Tokenizer, tags: dict[str, Sequence[int]]) -> dict[int, str]:
    return {ids[0]: tag for tag, ids in tags.items() if len(ids) == 1 and ids[0] in tokenizer.special_ids}
