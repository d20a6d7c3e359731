"""Held-out text without a hub: the English prose that every CPython carries, or the recipe's own file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from stillhouse.engine.errors import StillhouseError, UsageError

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


def token_ids(text: Text, tokenizer_file: Path) -> list[int]:
    """The text's tokens, without special ones."""
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(tokenizer_file)).encode(text.content, add_special_tokens=False).ids
    return ids


def token_windows(ids: list[int], context_length: int) -> list[list[int]]:
    """Windows of equal length spread evenly over the text, at least LEAST_TOKENS predicted tokens together.

    Raises UsageError where the text is too short for a figure that means something.
    """
    length = min(WINDOW_TOKENS, context_length)
    count = -(-LEAST_TOKENS // (length - 1))
    if len(ids) < LEAST_TOKENS + length:
        raise UsageError(
            f"evaluate.text has {len(ids)} tokens; fidelity needs at least {LEAST_TOKENS + length}",
            hint="name a longer text, or leave [evaluate] text out",
        )
    last = len(ids) - length
    starts = [round(index * last / (count - 1)) for index in range(count)]
    return [ids[start : start + length] for start in starts]
