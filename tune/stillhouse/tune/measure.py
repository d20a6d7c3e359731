"""What one model is worth: perplexity of held-out answers and of general text, tasks, the length of its answers.

The asking is the build's (answers.py), so that its gate and these figures come from the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.build.answers import Question, Reply, ask, greedy
from stillhouse.build.tasks import Tasks
from stillhouse.build.verify import log_softmax
from stillhouse.engine.directory import VersionDirectory
from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.manifest import ModelRecord
from stillhouse.engine.text import Tokenizer
from stillhouse.tune.encoding import Encoder, Example
from stillhouse.tune.splits import Split

SLOTS = 8  # as many as `greedy` asks at once
LENGTH_RECORDS, LENGTH_TOKENS = 24, 128  # records that are answered to measure the answers' length; where they are cut


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is measured; `open` gives a runner of SLOTS slots of so many tokens."""

    name: str
    network: ModelRecord
    text: Tokenizer
    open: Callable[[int], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Questions:
    """What every subject is asked; `windows` are token windows of a general text."""

    records: Split | None
    general: Split | None
    tasks: Tasks | None
    general_tasks: Tasks | None
    windows: list[list[int]]


@dataclass(slots=True)
class Losses:
    """Summed loss in nats, and tokens, of each text."""

    nats: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Measured:
    """One subject's answers; lists are in the order of what was asked, so that two subjects can be paired."""

    name: str
    records: Losses
    general: Losses
    text: Losses
    tasks: list[Reply]
    general_tasks: list[Reply]
    answer_tokens: list[int]
    answers_cut: int  # answers that had not ended at LENGTH_TOKENS, or at the end of the context


def measure(subject: Subject, asked: Questions) -> Measured:
    """Asks `subject` everything. Raises StillhouseError where something does not fit into its context."""
    eos = set(subject.network.eos_token_ids)
    encoder = Encoder(subject.text, subject.network.eos_token_ids)
    records, general = _examples(asked.records, encoder), _examples(asked.general, encoder)
    questions, general_questions = _questions(asked.tasks, subject), _questions(asked.general_tasks, subject)
    for_length = records[:: -(-len(records) // LENGTH_RECORDS)] if records else []
    context = subject.network.context_length
    room = [min(LENGTH_TOKENS, context - len(example.prompt)) for example in for_length]
    longest = max(
        [len(example) for example in records + general]
        + [len(example.prompt) + tokens for example, tokens in zip(for_length, room, strict=True)]
        + [question.tokens for question in questions + general_questions]
        + [len(window) for window in asked.windows]
    )
    if longest > context:
        raise StillhouseError(
            f"{subject.name}: the longest record or task needs {longest} tokens, its context is {context}",
            hint="shorten it",
        )
    with subject.open(longest) as runner:
        written = greedy(runner, [example.prompt for example in for_length], room, eos)
        return Measured(
            subject.name,
            records=_answer_losses(runner, records),
            general=_answer_losses(runner, general),
            text=_window_losses(runner, asked.windows),
            tasks=ask(runner, subject.text, questions, eos),
            general_tasks=ask(runner, subject.text, general_questions, eos),
            answer_tokens=[sum(token not in eos for token in ids) for ids in written],
            answers_cut=sum(ids[-1] not in eos for ids in written),
        )


def _examples(split: Split | None, encoder: Encoder) -> list[Example]:
    """The last answer of every conversation."""
    return [examples[-1] for examples in encoder.split(split)] if split else []


def _questions(tasks: Tasks | None, subject: Subject) -> list[Question]:
    return [Question(subject.text, task) for task in tasks.tasks] if tasks else []


def _answer_losses(runner: Any, examples: Sequence[Example]) -> Losses:
    losses = Losses()
    for example in examples:
        losses.nats.append(_nats(_answer_logits(runner, example), example.answer))
        losses.tokens.append(len(example.answer))
    return losses


def _answer_logits(runner: Any, example: Example) -> Any:
    """The logits that predict the answer, (len(answer), V): none of the prompt's, which may be gigabytes."""
    tokens = (example.prompt + example.answer)[:-1]  # the last one predicts nothing
    first = len(example.prompt) - 1
    # One token is another kernel than several (DESIGN §5): neither part is a single one.
    start = min(first, len(tokens) - 2)
    if start < 2:
        return runner.prefill(0, tokens, 0)[first:]
    runner.prefill(0, tokens[:start], 0, last_only=True)
    return runner.prefill(0, tokens[start:], start)[first - start :]


def _window_losses(runner: Any, windows: Sequence[list[int]]) -> Losses:
    losses = Losses()
    for window in windows:
        losses.nats.append(_nats(runner.prefill(0, window[:-1], 0), window[1:]))
        losses.tokens.append(len(window) - 1)
    return losses


def _nats(logits: Any, wanted: Sequence[int]) -> float:
    """The loss of the tokens `wanted`, each predicted by its row of `logits`."""
    return -float(np.take_along_axis(log_softmax(logits), np.asarray(wanted)[:, None], -1).sum(dtype=np.float64))


def checkpoint_subject(name: str, weights: Path, texts: Path, network: ModelRecord) -> Subject:
    """A checkpoint's folder, run by torch; its tokenizer lies in `texts`."""

    @contextmanager
    def opened(_: int) -> Iterator[Any]:
        from stillhouse.tune.torch_runner import TorchRunner, load

        yield TorchRunner(load(weights))

    return Subject(name, network, Tokenizer(texts), opened)


def provider_of(version: VersionDirectory) -> str:
    """What runs a built version here: where its target is not there, the CPU, which is said."""
    from stillhouse.engine.session import choose_provider

    return choose_provider("auto", version.manifest.target)


def version_subject(version: VersionDirectory, name: str, provider: str) -> Subject:
    """A built version, run by the engine on `provider`."""
    network = version.manifest.network

    @contextmanager
    def opened(longest: int) -> Iterator[Any]:
        from stillhouse.engine.runner import OrtRunner

        yield OrtRunner(version.model_path, network=network, slots=SLOTS, max_len=longest, provider=provider)

    return Subject(name, network, Tokenizer(version.path), opened)
