"""Conversations in tokens: the prompt exactly as the engine will render it when it serves, then the answer.

The text door is the engine's own, so that training and serving cannot drift apart. Every answer of the assistant in a
conversation becomes an example of its own, with all that was said before it as the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.engine.errors import InvalidRequest, StillhouseError
from stillhouse.engine.text import Tokenizer
from stillhouse.tune.splits import Message, Split

_MARK = "\u241f"
_THINKS, _THOUGHT = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt and of the answer behind it; the answer's last token ends the turn.

    `weight` is what its loss counts for in training, 1 but for class weights.
    """

    prompt: list[int]
    answer: list[int]
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class Encoder:
    """Encodes conversations for one base; `eos_token_ids` are what ends its generation."""

    def __init__(self, text: Tokenizer, eos_token_ids: Sequence[int]) -> None:
        self._text = text
        self._eos = list(eos_token_ids)
        self._end = self._end_of_turn()

    def examples(self, conversation: Sequence[Message], weight: float = 1.0) -> list[Example]:
        """An example for each answer in the conversation."""
        places = [at for at, message in enumerate(conversation) if message["role"] == "assistant" and at > 0]
        return [self._example(conversation[:at], conversation[at]["content"], weight) for at in places]

    def split(self, split: Split) -> list[list[Example]]:
        """The examples of each of the split's conversations; StillhouseError that names a record that is refused."""
        records = zip(split.numbers, split.conversations, split.weights, strict=True)
        return [self._record(split.path, *record) for record in records]

    def _record(self, file: Path, number: int, conversation: Sequence[Message], weight: float) -> list[Example]:
        try:
            return self.examples(conversation, weight)
        except InvalidRequest as error:
            raise StillhouseError(
                f"{file}: record {number}: {error}",
                hint="change or leave out the record: this base would not be served with such a conversation",
            ) from error

    def _example(self, asked: Sequence[Message], answer: str, weight: float) -> Example:
        if not self._text.has_chat_template:
            # As the build asks a model that has no template; a space stands between prompt and answer.
            prompt = "\n".join(message["content"] for message in asked)
            between = "" if prompt.endswith((" ", "\n")) else " "
            tokens = self._text.encode(between + answer, add_special_tokens=False)
            return Example(self._text.encode(prompt), [*tokens, *self._end], weight)
        prompt = self._text.render_chat(asked)
        tokens = self._text.encode(_behind_thoughts(prompt, answer), add_special_tokens=False)
        return Example(self._text.encode(prompt, add_special_tokens=False), [*tokens, *self._end], weight)

    def _end_of_turn(self) -> list[int]:
        """What ends an answer: the end token that the template writes behind it, else the model's first one."""
        if self._text.has_chat_template:
            turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
            rendered = self._text.render_chat(turn, add_generation_prompt=False)
            behind = self._text.encode(rendered.rpartition(_MARK)[2], add_special_tokens=False)
            ends = [token for token in behind if token in self._eos]
            if ends:
                return ends[:1]
        return self._eos[:1]


def _behind_thoughts(prompt: str, answer: str) -> str:
    """The answer as it goes on from the prompt: a template that opens a thought wants it closed (R1-Distill's does)."""
    if not prompt.rstrip().endswith(_THINKS):
        return answer
    if _THOUGHT in answer:
        return answer.lstrip().removeprefix(_THINKS).lstrip("\n")
    return f"\n{_THOUGHT}\n\n{answer}"


def pack(examples: Sequence[Example], max_length: int, seed: int) -> list[list[Example]]:
    """Groups of examples of up to `max_length` tokens, first fit in random order; the groups are the same every time.

    They lie one after the other in a sequence and see nothing of each other (`collate`).
    """
    order = random.Random(seed).sample(list(examples), len(examples))
    groups: list[list[Example]] = []
    room: list[int] = []
    open_from = 0
    for example in order:
        at = next((at for at in range(open_from, len(groups)) if room[at] >= len(example)), None)
        if at is None:
            groups.append([])
            room.append(max_length)
            at = len(groups) - 1
        groups[at].append(example)
        room[at] -= len(example)
        # Only the last groups are looked at, so that packing stays linear.
        open_from = max(open_from, len(groups) - 64)
    return groups


def fitting(examples: Collection[Example], max_length: int) -> list[Example]:
    """The examples that are no longer than `max_length` tokens."""
    return [example for example in examples if len(example) <= max_length]


def collate(groups: Sequence[Sequence[Example]]) -> dict[str, Any]:
    """All examples one after the other in one sequence of S tokens, for a causal model of transformers.

    input_ids and position_ids are (1, S); positions begin anew at each example, by which transformers knows (without
    an attention mask) that they see nothing of each other. The head runs on the N positions alone whose next token
    belongs to an answer: `logits_to_keep` (N,); `labels` and `shift_labels` (1, N) are those next tokens. Where some
    count for more or less than 1, `weights` (N,) say so.
    """
    import torch

    ids: list[int] = []
    positions: list[int] = []
    kept: list[int] = []
    wanted: list[int] = []
    weights: list[float] = []
    for example in (example for group in groups for example in group):
        first = len(ids) + len(example.prompt) - 1
        kept += range(first, first + len(example.answer))
        wanted += example.answer
        weights += [example.weight] * len(example.answer)
        ids += example.prompt + example.answer
        positions += range(len(example))
    labels = torch.tensor([wanted])
    weighted = {} if all(weight == 1.0 for weight in weights) else {"weights": torch.tensor(weights)}
    return weighted | {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "logits_to_keep": torch.tensor(kept),
        "labels": labels,
        "shift_labels": labels,
        "use_cache": False,  # with a cache transformers would not look at the positions
    }
