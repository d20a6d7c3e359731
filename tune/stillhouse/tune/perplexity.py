"""Answers under a scoring model: what it finds far too easy or far too odd is seldom a good example.

The perplexity of an answer is exp of the mean negative log-likelihood of its tokens, given the prompt. The low tail is
boilerplate and answers that repeat their prompt; the high tail is garble (Marion et al., 2023, "When less is more",
keep a middle part of the ranks too).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.build.hub import folder_of
from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.data_recipe import Perplexity
from stillhouse.tune.records import Record, answer_of, conversation_of, prompt_of
from stillhouse.tune.store import Store

STAGE = "perplexity"
# Records are sorted by length within so many, which keeps a batch's padding small and memory bounded.
_WINDOW = 1024

Row = tuple[int, list[int], int]  # a record's number, its tokens, and where the answer begins among them
Scores = dict[int, float]


def drop_by_perplexity(
    store: Store, options: Perplexity, source: str, revision: str | None, share: Callable[[float], None]
) -> dict[str, Any]:
    """Drops the answers outside the two percentiles; what the card says of it, with the scores' percentiles."""
    scores = score(store, options, source, revision, share)
    values = np.array(list(scores.values()))
    if not len(values):
        return {"scored": 0}
    low, high = (float(bound) for bound in np.percentile(values, [options.low, options.high]))
    for number, value in scores.items():
        if value < low:
            why = f"perplexity {value:.3g} is below the percentile {options.low:g} ({low:.3g}): too easy"
        elif value > high:
            why = f"perplexity {value:.4g} is above the percentile {options.high:g} ({high:.4g}): too odd"
        else:
            continue
        store.drop(number, STAGE, why, perplexity=round(value, 4))
    marks = (0, 1, 5, 25, 50, 75, 95, 99, 100)
    return {
        "scored": len(values),
        "low": low,
        "high": high,
        "percentiles": {str(mark): round(float(np.percentile(values, mark)), 4) for mark in marks},
    }


def score(
    store: Store, options: Perplexity, source: str, revision: str | None, share: Callable[[float], None]
) -> Scores:
    """The perplexity of every living record's answer, by number, in order. Raises StillhouseError without a model."""
    import torch

    model, tokenizer = _load(source, revision, options.device)
    encode = _encoder(tokenizer, options.max_tokens)
    scores: Scores = {}
    total = max(store.count(), 1)
    with torch.inference_mode():
        for window in _windows(store, encode):
            for batch in _batches(window, options.batch_tokens):
                scores.update(_perplexities(model, batch))
            share(len(scores) / total)
    return dict(sorted(scores.items()))


def _load(source: str, revision: str | None, device: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder_of(source, revision, "perplexity.model")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StillhouseError(
            f"perplexity: cannot load {source}: {reason}", hint="name a checkpoint's folder, or leave [perplexity] out"
        ) from None
    return model, tokenizer


def _encoder(tokenizer: Any, max_tokens: int) -> Callable[[Record], tuple[list[int], int]]:
    """A record's tokens, at most `max_tokens`, and where its answer begins; a long prompt loses its beginning."""

    def encode(record: Record) -> tuple[list[int], int]:
        if tokenizer.chat_template:
            text = _rendered(tokenizer, record)
            prompt = tokenizer(text, add_special_tokens=False).input_ids
        else:
            prompt = tokenizer(f"{prompt_of(record)}\n").input_ids
        answer = tokenizer(answer_of(record), add_special_tokens=False).input_ids[: max_tokens - 1]
        prompt = prompt[-(max_tokens - len(answer)) :] or [tokenizer.eos_token_id or 0]
        return prompt + answer, len(prompt)

    return encode


def _rendered(tokenizer: Any, record: Record) -> str:
    """The prompt through the chat template, which may refuse roles or their order."""
    from jinja2 import TemplateError

    try:
        turns = conversation_of(record)[:-1]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        file, *place = record["source"].values()
        raise StillhouseError(
            f"perplexity: {file}, record {place[0]}: the scoring model's chat template refuses it: {error}",
            hint="leave such records out, name another [perplexity] model, or leave [perplexity] out",
        ) from None


def _windows(store: Store, encode: Callable[[Record], tuple[list[int], int]]) -> Iterator[list[Row]]:
    rows: list[Row] = []
    for number, record in store.living():
        ids, start = encode(record)
        if len(ids) > start:
            rows.append((number, ids, start))
        if len(rows) == _WINDOW:
            yield rows
            rows = []
    if rows:
        yield rows


def _batches(rows: list[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Rows of like length, as many as fit `batch_tokens` when padded; one row at least."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: (len(row[1]), row[0])):
        if batch and (len(batch) + 1) * len(row[1]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _perplexities(model: Any, batch: list[Row]) -> Scores:
    import torch

    longest = len(batch[-1][1])
    ids = torch.zeros((len(batch), longest), dtype=torch.int64)  # (B, S), padded on the right, where nobody looks
    mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, -100)
    for row, (_, tokens, start) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        targets[row, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])  # what comes after each position
    # Logits from the first answer's beginning on; those of prompts would be most of the memory.
    kept = longest - min(start for _, _, start in batch) + 1
    device = model.device
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=kept).logits.float()
    targets = targets[:, -kept:].to(device)
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=-100, reduction="none"
    )  # (B, kept)
    means: NDArray[np.float64] = (losses.sum(1) / (targets != -100).sum(1)).double().cpu().numpy()
    return {number: math.exp(min(float(mean), 700.0)) for (number, _, _), mean in zip(batch, means, strict=True)}
