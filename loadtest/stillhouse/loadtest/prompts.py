"""The prompts that users send: a JSONL file's, or a small set of our own."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse.loadtest.errors import BadInput

# The arguments of Client.stream that differ from request to request: {"prompt": …} or {"messages": […]}.
Prompt = dict[str, Any]

_FORM = 'every line is {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'

DEFAULT_PROMPTS: tuple[Prompt, ...] = tuple(
    {"messages": [{"role": "user", "content": text}]}
    for text in (
        "What is the capital of France?",
        "Explain in two sentences why the sky is blue.",
        "My parcel arrived with a broken cup. What can I do?",
        "Write a friendly reminder that a library book is due on Friday.",
        "Name three vegetables that grow well in the shade.",
        "How do I change a bicycle tube? List the steps.",
        "Summarise in one sentence: The meeting was moved from Monday to Wednesday because two of the speakers are "
        "travelling, the large room is only free in the afternoon, and the budget must be printed before it is shown.",
        "Translate into plain words: The aforementioned party shall be liable for all costs thus incurred.",
        "I ordered two lamps and got one. The invoice lists both. Draft a short message to the shop.",
        "What is the difference between weather and climate?",
        "Give me a name and a slogan for a bakery that opens at four in the morning.",
        "A train leaves at 14:20 and arrives at 17:05. How long is the journey?",
    )
)


def load_prompts(path: Path | None) -> list[Prompt]:
    """The prompts of a JSONL file, or the default ones. Raises BadInput naming the file and line."""
    if path is None:
        return list(DEFAULT_PROMPTS)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BadInput(f"cannot read the prompt file {path}: {error.strerror}", hint=_FORM) from None
    except UnicodeDecodeError:
        raise BadInput(f"the prompt file {path} is not UTF-8 text", hint=_FORM) from None
    prompts = [_read_line(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise BadInput(f"the prompt file {path} holds no prompt", hint=_FORM)
    return prompts


def shuffled(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """The same prompts in an order of the seed's own."""
    order = list(prompts)
    random.Random(seed).shuffle(order)
    return order


def _read_line(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError:
        raise BadInput(f"{where}: not JSON: {line[:60]!r}", hint=_FORM) from None
    if isinstance(value, dict):
        prompt, messages = value.get("prompt"), value.get("messages")
        if isinstance(prompt, str) and prompt and messages is None:
            return {"prompt": prompt}
        if isinstance(messages, list) and messages and prompt is None:
            return {"messages": messages}
    raise BadInput(f"{where}: neither a prompt nor messages: {line[:60]!r}", hint=_FORM)
