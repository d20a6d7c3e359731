"""Calibration text: what the model itself says, or the recipe's own file. Never the text that a gate is held on.

A model's own samples are of the distribution that it will be asked for, and need no data set. Half of them begin with
a token drawn from the vocabulary, half with the chat template's opening of a user's turn, which the model goes on from
as if it were the user (Xu et al., 2024, https://arxiv.org/abs/2406.08464).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.build.texts import Text, spread, token_ids
from stillhouse.build.worker import Share
from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.manifest import ModelRecord
from stillhouse.engine.runner import OrtRunner

_MARK = "\u241f"
_STRETCH = 256

SEQUENCES, HELD_OUT, LENGTH = 32, 8, 256  # a quarter of the sequences is held out


def calibrate(
    share: Share, *, model: str, checkpoint: str, network: dict[str, Any], destination: str, text: str | None = None
) -> dict[str, Any]:
    """Writes calibration.json to `destination`: windows to calibrate on, and others, held out, to choose by.

    From the file `text`, or sampled from the FP32 graph at `model`. Raises StillhouseError where the text is too short.
    """
    shape = ModelRecord.model_validate(network)
    length = min(LENGTH, shape.context_length)
    if text is None:
        label = "the model's own samples"
        windows = own_samples(share, Path(model), Path(checkpoint), shape, sequences=SEQUENCES, length=length, seed=0)
    else:
        label = Path(text).name
        windows = windows_of(text, Path(checkpoint) / "tokenizer.json", length)
    content = {
        "text": label,
        "sha256": hashlib.sha256(np.asarray(windows, "<i8").tobytes()).hexdigest(),
        "tokens": (SEQUENCES - HELD_OUT) * length,
        "held_out_tokens": HELD_OUT * length,
        # Pairs of neighbours, because every other sample is a chat.
        "windows": [window for index, window in enumerate(windows) if index // 2 % 4],
        "held_out": [window for index, window in enumerate(windows) if not index // 2 % 4],
    }
    folder = Path(destination)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.json").write_text(json.dumps(content), "utf-8")
    share(1.0)
    return {}


def windows_of(file: str, tokenizer: Path, length: int) -> list[list[int]]:
    """SEQUENCES windows of the file's tokens, spread evenly over it; they do not overlap."""
    try:
        content = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StillhouseError(f"calibration: cannot read {file}: {error}", hint="name a text file in UTF-8") from None
    ids = token_ids(Text(file, content, ""), tokenizer)
    if len(ids) < SEQUENCES * length:
        raise StillhouseError(
            f"calibration: {file} has {len(ids)} tokens; {SEQUENCES * length} are needed",
            hint="name a longer text, or none: the model's own samples are good",
        )
    return spread(ids, length, SEQUENCES)


def own_samples(
    share: Share, model: Path, checkpoint: Path, network: ModelRecord, *, sequences: int, length: int, seed: int
) -> list[list[int]]:
    """`sequences` texts of `length` tokens each, sampled at temperature 1 from the graph at `model`."""
    rng = np.random.default_rng(seed)
    opening = chat_opening(checkpoint)[: length // 2]
    texts: list[list[int]] = []
    for index in range(sequences):
        chat = index % 2 == 1 and len(opening) > 1
        texts.append(list(opening) if chat else [int(token) for token in rng.integers(0, network.vocab_size, 1)])
    runner = OrtRunner(model, network=network, slots=sequences, max_len=length)
    for slot, text in enumerate(texts):
        logits = runner.prefill(slot, text, 0)[-1:]
        text.append(int(sampled(logits, rng)[0]))
    while any(len(text) < length for text in texts):
        # Texts with a longer opening are done earlier; they go on, and what is too much is cut.
        last = [text[-1] for text in texts]
        at = [min(len(text), length) - 1 for text in texts]
        for text, token in zip(texts, sampled(runner.decode(last, at), rng), strict=True):
            text.append(int(token))
        share(min(len(text) for text in texts) / length)
    return [text[:length] for text in texts]


def sampled(logits: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int64]:
    """A token for each row of `logits` (N, V), drawn at temperature 1: first a stretch of the ids, then in it."""
    rows = np.arange(len(logits))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = np.pad(weights, ((0, 0), (0, -weights.shape[1] % _STRETCH))).reshape(len(logits), -1, _STRETCH)
    stretches = weights.sum(-1).cumsum(-1)
    drawn = rng.random((len(logits), 1), np.float32) * stretches[:, -1:]
    stretch = np.minimum((stretches < drawn).sum(-1), stretches.shape[1] - 1)
    before = np.where(stretch > 0, stretches[rows, stretch - 1], 0)[:, None]
    inside = weights[rows, stretch].cumsum(-1)
    place = (inside < np.minimum(drawn - before, inside[:, -1:])).sum(-1)
    tokens: NDArray[np.int64] = stretch * _STRETCH + place
    return tokens


def chat_opening(checkpoint: Path) -> list[int]:
    """The tokens with which the chat template opens a user's turn; none where there is no template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint), local_files_only=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        return []
    rendered: str = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    ids: list[int] = tokenizer(rendered.partition(_MARK)[0], add_special_tokens=False)["input_ids"]
    return ids
