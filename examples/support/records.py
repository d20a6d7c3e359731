"""Read the example's records and turn them into token ids through the model's own chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "smollm2" / "base"
ADAPTER = HERE / "adapter"
IGNORED = -100  # PyTorch's label for a position without loss


@dataclass(frozen=True)
class Example:
    """One record as ids: the prompt, rendered for generation, and the answer that follows it."""

    prompt_ids: list[int]
    answer_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file, one object a line."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def question_of(record: dict[str, Any]) -> str:
    """The user turn of a record: its instruction, and below it its input if it has one."""
    return f"{record['instruction']}\n\n{record['input']}" if record["input"] else str(record["instruction"])


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    """Ids of `question` as a user turn, up to where the assistant begins to speak."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def encode(tokenizer: Any, record: dict[str, Any]) -> Example:
    """Encode one record. An answer that was cut off (`"complete": false`) does not end with the end token."""
    answer: list[int] = tokenizer.encode(record["output"], add_special_tokens=False)
    if record.get("complete", True):
        answer = [*answer, tokenizer.eos_token_id]
    return Example(prompt_ids(tokenizer, question_of(record)), answer)


def to_tensors(batch: Iterable[Example], pad_id: int) -> tuple[Any, Any, Any]:
    """Pad on the right. Returns input_ids, attention_mask and labels, each (B, S) int64; labels only on answers."""
    import torch

    rows = list(batch)
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for index, row in enumerate(rows):
        start, end = len(row.prompt_ids), len(row)
        ids[index, :end] = torch.tensor(row.prompt_ids + row.answer_ids)
        mask[index, :end] = 1
        labels[index, start:end] = torch.tensor(row.answer_ids)
    return ids, mask, labels


def answer_losses(model: Any, ids: Any, mask: Any, labels: Any) -> Any:
    """Cross-entropy in nats of each answer token, flat (N,).

    The head runs on the answers' positions alone: with a vocabulary of 49,152 it is a fifth of the model.
    """
    import torch

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # (B, S, D)
    wanted = labels[:, 1:] != IGNORED
    logits = causal.lm_head(hidden[:, :-1][wanted])  # (N, V)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted], reduction="none")
