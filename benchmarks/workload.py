"""What every peer is asked: prompts and held-out text, as token ids of the one tokenizer they share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

SHORTEST_PROMPT, LONGEST_PROMPT = 64, 128  # tokens
WINDOW_TOKENS = 512


class Workload:
    """Prompts cut at random places out of Python's own manual (`pydoc_data.topics`); the same `seed`, the same prompts.

    The first `held_out_tokens` are for perplexity, and no prompt comes from there.
    """

    def __init__(self, ids: list[int], seed: int, held_out_tokens: int = 4096) -> None:
        self._held_out, self._ids = ids[:held_out_tokens], ids[held_out_tokens:]
        if len(self._ids) < 2048:
            raise ValueError(f"the text has {len(ids)} tokens, {held_out_tokens + 2048} are needed")
        self._seed = seed

    @classmethod
    def of_manual(cls, tokenizer_json: Path, seed: int, held_out_tokens: int = 4096) -> Workload:
        from pydoc_data import topics

        from tokenizers import Tokenizer

        text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
        return cls(
            Tokenizer.from_file(str(tokenizer_json)).encode(text, add_special_tokens=False).ids, seed, held_out_tokens
        )

    def prompt(self, tokens: int, *salt: Any) -> list[int]:
        """A prompt of `tokens` tokens; `salt` (round, measure, number) tells it from others."""
        start = random.Random(f"{self._seed}/{salt}").randrange(len(self._ids) - tokens)
        return self._ids[start : start + tokens]

    def prompts(self, count: int, *salt: Any) -> list[list[int]]:
        """`count` prompts of 64 to 128 tokens."""
        lengths = random.Random(f"{self._seed}/lengths/{salt}")
        return [self.prompt(lengths.randint(SHORTEST_PROMPT, LONGEST_PROMPT), *salt, number) for number in range(count)]

    def windows(self) -> list[list[int]]:
        """The held-out text in windows of 512 tokens."""
        ids = self._held_out
        return [ids[start : start + WINDOW_TOKENS] for start in range(0, len(ids) - WINDOW_TOKENS + 1, WINDOW_TOKENS)]
