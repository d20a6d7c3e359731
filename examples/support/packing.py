"""Several short texts in one sequence, which see nothing of each other, behind a system prompt that they share.

A record of the shop is about 60 tokens, and nearly half of them are the same system prompt. Packed, the prompt is
computed once a step, nothing is padded, and the matrices are large enough for a CPU to be quick with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from records import Example


@dataclass(frozen=True)
class Pack:
    """One packed sequence of S tokens. Index pairs say where the model's output meets what it should be.

    input_ids and position_ids are (1, S) int64, mask is (1, 1, S, S) bool, True where row may look at column.
    `answers_at` (N,) are the positions whose next token is `answer_ids` (N,). `spans[k]` are the positions that
    belong to the k-th text alone, the shared prompt left out.
    """

    input_ids: Any
    position_ids: Any
    mask: Any
    answers_at: Any
    answer_ids: Any
    spans: list[slice]


def shared_prefix(examples: Sequence[Example]) -> int:
    """How many tokens all prompts begin with."""
    first = examples[0].prompt_ids
    length = min(len(example.prompt_ids) for example in examples) - 1
    while any(example.prompt_ids[:length] != first[:length] for example in examples):
        length -= 1
    return length


def pack(examples: Sequence[Example], texts: Sequence[Sequence[int]], prefix: int) -> Pack:
    """Pack chat examples, whose first `prefix` tokens are the same, and plain texts into one sequence."""
    import torch

    ids = list(examples[0].prompt_ids[:prefix]) if examples else []
    positions = list(range(len(ids)))
    owner = [0] * len(ids)  # 0 is the shared prompt; texts get negative numbers, for they don't look at it
    answers_at: list[int] = []
    answer_ids: list[int] = []
    spans: list[slice] = []
    for number, example in enumerate(examples, start=1):
        tail = example.prompt_ids[prefix:] + example.answer_ids
        spans.append(slice(len(ids), len(ids) + len(tail)))
        answer_start = len(ids) + len(example.prompt_ids) - prefix
        answers_at += range(answer_start - 1, answer_start - 1 + len(example.answer_ids))
        answer_ids += example.answer_ids
        ids += tail
        positions += range(prefix, prefix + len(tail))
        owner += [number] * len(tail)
    for number, text in enumerate(texts, start=1):
        spans.append(slice(len(ids), len(ids) + len(text)))
        ids += text
        positions += range(len(text))
        owner += [-number] * len(text)

    owners = torch.tensor(owner)
    same = owners[:, None] == owners[None, :]
    to_prompt = (owners[:, None] > 0) & (owners[None, :] == 0)
    return Pack(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        mask=((same | to_prompt).tril())[None, None],
        answers_at=torch.tensor(answers_at, dtype=torch.int64),
        answer_ids=torch.tensor(answer_ids, dtype=torch.int64),
        spans=spans,
    )


def hidden_states(causal: Any, packed: Pack) -> Any:
    """The last hidden states (S, D) of a Llama, what its head would turn into logits."""
    return causal.model(
        input_ids=packed.input_ids,
        attention_mask=packed.mask,
        position_ids=packed.position_ids,
        use_cache=False,
    ).last_hidden_state[0]
