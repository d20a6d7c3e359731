"""The server's counts of tokens, checked with a tokenizer of one's own.

The texts of an answer's pieces are put together and cut into tokens again. That need not give the very tokens that the
model made, and a fair check allows for what is nobody's fault:
- the end token, and the marks around thoughts, are counted by a server but left out of its text: up to 3 tokens;
- a model may spell a word in other pieces than the tokenizer would, and an answer may end within a character: 2 %.
A count that is further off than the larger of both is a disagreement. Such are the counts of a server that counts its
responses (of several tokens each), the prompt, or words, and those of a file that is not this model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillhouse.loadtest.errors import BadInput

TOLERANCE_TOKENS = 3
TOLERANCE_SHARE = 0.02

CountTokens = Callable[[str], int]


@dataclass
class CountCheck:
    """What the counts of many finished answers come to; `by` is the server's count less the tokenizer's."""

    answers: int = 0
    disagreeing: int = 0
    server_tokens: int = 0
    tokenizer_tokens: int = 0
    worst_by: int = 0  # of all answers, also of those that agree

    def add(self, server_tokens: int, tokenizer_tokens: int) -> None:
        self.answers += 1
        self.disagreeing += not agrees(server_tokens, tokenizer_tokens)
        self.server_tokens += server_tokens
        self.tokenizer_tokens += tokenizer_tokens
        self.worst_by = max(self.worst_by, server_tokens - tokenizer_tokens, key=abs)

    def merge(self, other: CountCheck) -> None:
        self.answers += other.answers
        self.disagreeing += other.disagreeing
        self.server_tokens += other.server_tokens
        self.tokenizer_tokens += other.tokenizer_tokens
        self.worst_by = max(self.worst_by, other.worst_by, key=abs)

    def __str__(self) -> str:
        share = self.server_tokens / max(self.tokenizer_tokens, 1) - 1
        return (
            f"{self.disagreeing} of {self.answers} token counts disagree with the tokenizer's by more than "
            f"{TOLERANCE_TOKENS} tokens or {100 * TOLERANCE_SHARE:g} %; at most by {self.worst_by:+d}, "
            f"in all {self.server_tokens} against {self.tokenizer_tokens} ({100 * share:+.1f} %)"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def agrees(server_tokens: int, tokenizer_tokens: int) -> bool:
    """Whether a server's count of an answer is as near the tokenizer's as a right count is."""
    return abs(server_tokens - tokenizer_tokens) <= max(TOLERANCE_TOKENS, TOLERANCE_SHARE * tokenizer_tokens)


def load_counter(path: Path | None) -> CountTokens | None:
    """Counts the tokens of a text as the tokenizer.json at `path` cuts it; None without one. Raises BadInput."""
    if path is None:
        return None
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except OSError as error:
        raise BadInput(f"cannot read the tokenizer {path}: {error.strerror}", hint=_HINT) from None
    except Exception as error:  # the library raises this class itself
        raise BadInput(f"the tokenizer {path} is not one of the tokenizers library: {error}", hint=_HINT) from None
    # What a tokenizer.json says of cutting off and filling up is for training: counts would all be the same.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


_HINT = "for example --tokenizer model_repository/support-int4/1/tokenizer.json"
