"""Held-out text without a hub: the English prose that every CPython carries, or the recipe's own file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from stillhouse.engine.errors import StillhouseError

WINDOW_TOKENS = 512
LEAST_TOKENS = 8_000


@dataclass(frozen=True, slots=True)
class Text:
    """A text, what it is called in a manifest, and the sha256 of its UTF-8 bytes."""

    label: str
    content: str
    sha256: str


def evaluation_text(path: str | None) -> Text:
    """The file's text, or 600 KB of Python's language reference; its hash says which one (they change with Python)."""
    if path is None:
        from pydoc_data.topics import topics

        label, content = "pydoc_data.topics", "\n\n".join(topics[key] for key in sorted(topics))
    else:
        try:
            label, content = Path(path).name, Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StillhouseError(
                f"evaluate.text: cannot read {path}: {error}", hint="name a plain text file in UTF-8"
            ) from None
    return Text(label, content, hashlib.sha256(content.encode("utf-8")).hexdigest())


def excerpts(text: Text, count: int = 8, characters: int = 1000) -> list[str]:
    """Pieces of the text, spread evenly over it."""
    last = max(0, len(text.content) - characters)
    return [text.content[at : at + characters] for at in (round(index * last / (count - 1)) for index in range(count))]


def token_ids(text: Text, tokenizer_file: Path) -> list[int]:
    """The text's tokens, without special ones. Raises StillhouseError where the file is no tokenizer."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise StillhouseError(
            f"{tokenizer_file} is no tokenizer: {error}", hint="copy or download the file again"
        ) from None
    tokenizer.no_truncation()  # trainers save both; a text is measured as it is, as the engine reads it
    tokenizer.no_padding()
    ids: list[int] = tokenizer.encode(text.content, add_special_tokens=False).ids
    return ids


def runs_of(windows: list[list[int]], length: int = 32) -> set[tuple[int, ...]]:
    """All runs of `length` tokens within the windows."""
    return {tuple(window[at : at + length]) for window in windows for at in range(len(window) - length + 1)}


def token_windows(ids: list[int], context_length: int) -> list[list[int]]:
    """Windows of equal length spread evenly over the text, at least LEAST_TOKENS predicted tokens together.

    Raises StillhouseError where the text is too short for a figure that means something.
    """
    length = min(WINDOW_TOKENS, context_length)
    count = -(-LEAST_TOKENS // (length - 1))
    if len(ids) < LEAST_TOKENS + length:
        raise StillhouseError(
            f"evaluate.text has {len(ids)} tokens; fidelity needs at least {LEAST_TOKENS + length}",
            hint="name a longer text, or leave [evaluate] text out",
        )
    return spread(ids, length, count)


def spread(ids: list[int], length: int, count: int) -> list[list[int]]:
    """`count` windows of `length` tokens, two at least, spread evenly from the text's first token to its last."""
    last = len(ids) - length
    starts = [round(index * last / (count - 1)) for index in range(count)]
    return [ids[start : start + length] for start in starts]
