"""What users send, as data: a file of prompts, a trace with arrival times, made-up lengths, or a small set of our own.

A file is JSONL with a line `{"prompt": …}` or `{"messages": […]}` each, or ShareGPT's layout (a JSON list, or JSONL, of
`{"conversations": [{"from": "human", "value": …}, …]}`, of which the first question is asked; those without one, of
which its files hold some, are left out). A line may say more:
`"max_tokens"`, and `"at_s"`, its arrival in seconds from the start; where the lines have it, the file is a trace.
A line `{"timestamp": ms, "input_length": n, "output_length": m}` (Mooncake's traces) is one with a made-up text.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse.loadtest.errors import BadInput
from stillhouse.loadtest.synthetic import Synthetic, words

# The arguments of a request that differ from one to another: "prompt" or "messages", and perhaps "max_tokens".
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


@dataclass(frozen=True)
class Workload:
    """The prompts; of a trace also when each is sent, in seconds from the start."""

    prompts: list[Prompt]
    times_s: list[float] | None = None
    left_out: int = 0  # conversations without a question


def load_workload(
    path: Path | None, synthetic: Synthetic | None = None, system_prompt: str = "", seed: int = 0, size: int = 256
) -> Workload:
    """The prompts of a file, or `size` made-up ones, or the default ones. Raises BadInput naming the file and line."""
    if path is not None and synthetic is not None:
        raise BadInput("prompts come from a file or are made up, not both", hint="leave out --prompts or --synthetic")
    workload = Workload(load_prompts(path)) if path is None else _read_file(path, seed)
    if synthetic is not None:
        workload = Workload(synthetic.prompts(size, seed))
    if system_prompt:
        return replace(workload, prompts=[_with_system(prompt, system_prompt) for prompt in workload.prompts])
    return workload


def load_prompts(path: Path | None) -> list[Prompt]:
    """The prompts of a file, or the default ones. Raises BadInput naming the file and line."""
    return list(DEFAULT_PROMPTS) if path is None else _read_file(path, 0).prompts


def shuffled(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """The same prompts in an order of the seed's own."""
    order = list(prompts)
    random.Random(seed).shuffle(order)
    return order


def _read_file(path: Path, seed: int) -> Workload:
    try:
        text = path.read_text(encoding="utf-8-sig")  # an editor's byte order mark is no part of it
    except OSError as error:
        raise BadInput(f"cannot read the prompt file {path}: {error.strerror}", hint=_FORM) from None
    except UnicodeDecodeError:
        raise BadInput(f"the prompt file {path} is not UTF-8 text", hint=_FORM) from None
    chance = random.Random(seed)
    values = _values(text, path)
    asking = [(value, where) for value, where in values if not _is_without_question(value)]
    entries = [_read_entry(value, where, chance) for value, where in asking]
    if not entries:
        without = f": none of its {len(values)} conversations has a question" if values else ""
        raise BadInput(f"the prompt file {path} holds no prompt{without}", hint=_FORM)
    left_out = len(values) - len(asking)
    times_s = [at_s for _, at_s in entries if at_s is not None]
    if not times_s:
        return Workload([prompt for prompt, _ in entries], None, left_out)
    if len(times_s) < len(entries):
        raise BadInput(
            f"{path}: only {len(times_s)} of {len(entries)} lines have an arrival time", hint="give all or none at_s"
        )
    entries.sort(key=lambda entry: entry[1] or 0.0)
    return Workload([prompt for prompt, _ in entries], [at_s - min(times_s) for at_s in sorted(times_s)], left_out)


def _values(text: str, path: Path) -> list[tuple[Any, str]]:
    """The entries of a JSON list or of JSONL, and where each stands."""
    if text.lstrip().startswith("["):
        try:
            listed = json.loads(text)
        except ValueError:
            listed = None  # perhaps JSONL after all, and then its bad line is named
        if isinstance(listed, list):
            return [(value, f"{path}, entry {n}") for n, value in enumerate(listed, start=1)]
    values = []
    # Not splitlines, which also cuts at U+2028 and U+0085: JSON's strings may hold those as they are.
    for n, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                values.append((json.loads(line), f"{path}, line {n}"))
            except ValueError:
                raise BadInput(f"{path}, line {n}: not JSON: {line[:60]!r}", hint=_FORM) from None
    return values


def _read_entry(value: Any, where: str, chance: random.Random) -> tuple[Prompt, float | None]:
    prompt = _read_prompt(value, chance) if isinstance(value, dict) else None
    if prompt is None:
        raise BadInput(f"{where}: neither a prompt nor messages: {json.dumps(value)[:60]!r}", hint=_FORM)
    limit = value.get("max_tokens", value.get("output_length"))
    if limit is not None:
        if not isinstance(limit, int) or limit < 1:
            raise BadInput(f"{where}: max_tokens is a whole number from 1, got {limit!r}", hint=_FORM)
        prompt["max_tokens"] = limit
    at = value.get("at_s", value["timestamp"] / 1e3 if isinstance(value.get("timestamp"), (int, float)) else None)
    if at is not None and not (isinstance(at, (int, float)) and 0 <= at < math.inf):
        raise BadInput(f"{where}: at_s is seconds from the start, got {at!r}", hint=_FORM)
    return prompt, at


def _read_prompt(value: dict[str, Any], chance: random.Random) -> Prompt | None:
    text, messages = value.get("prompt"), value.get("messages")
    if isinstance(text, str) and text and messages is None:
        return {"prompt": text}
    if isinstance(messages, list) and messages and text is None and all(isinstance(one, dict) for one in messages):
        return {"messages": messages}
    question = _first_question(value)
    if question is not None:
        return {"messages": [{"role": "user", "content": question}]}
    length = value.get("input_length")
    if isinstance(length, int) and length > 0:
        return {"messages": [{"role": "user", "content": words(length, chance)}]}
    return None


def _first_question(value: dict[str, Any]) -> str | None:
    """Of a conversation in ShareGPT's layout."""
    turns = value.get("conversations")
    asked = [
        turn.get("value")
        for turn in (turns if isinstance(turns, list) else [])
        if isinstance(turn, dict) and turn.get("from") in ("human", "user")
    ]
    return next((text for text in asked if isinstance(text, str) and text), None)


def _is_without_question(value: Any) -> bool:
    """A conversation, empty or one in which the model alone speaks."""
    if not isinstance(value, dict) or not isinstance(value.get("conversations"), list):
        return False
    return _first_question(value) is None and value.keys().isdisjoint(("prompt", "messages", "input_length"))


def _with_system(prompt: Prompt, system_prompt: str) -> Prompt:
    if "prompt" in prompt:
        return {**prompt, "prompt": f"{system_prompt}\n\n{prompt['prompt']}"}
    return {**prompt, "messages": [{"role": "system", "content": system_prompt}, *prompt["messages"]]}
