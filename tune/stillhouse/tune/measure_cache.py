"""Measured once: what a model answered is kept in the build's stage cache, under a hash of the model and the questions.

So an evaluation that was killed goes on at the next model, and the same base is not measured again for another
fine-tune.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillhouse.build.answers import Reply
from stillhouse.build.cache import key_of, stage_entry
from stillhouse.tune.measure import LENGTH_RECORDS, LENGTH_TOKENS, SLOTS, Losses, Measured, Questions, Subject, measure
from stillhouse.tune.revisions import MEASURED, code_of

log = logging.getLogger(__name__)

_STAGE = "measured"
_LOSSES, _REPLIES = ("records", "general", "text"), ("tasks", "general_tasks")


@dataclass(frozen=True, slots=True)
class Model:
    """A model to measure: all that decides what it answers, and how to come by it, which may take long."""

    name: str
    made_of: dict[str, Any]
    subject: Callable[[], Subject]


def measured_once(root: Path, model: Model, asked: Questions, *, ignore: bool = False) -> Measured:
    """What `model` answered to the questions: measured now, where the cache at `root` has it not (or `ignore`)."""

    def make(_: Path) -> dict[str, Any]:
        log.info("measuring: %s", model.name)
        found = asdict(measure(model.subject(), asked))
        del found["name"]  # the same model has another one elsewhere
        return found

    inputs = {
        "code": code_of(MEASURED),
        "settings": [SLOTS, LENGTH_RECORDS, LENGTH_TOKENS],
        "model": model.made_of,
        "asked": _hashes(asked),
    }
    with stage_entry(root, _STAGE, key_of(inputs), make, ignore=ignore) as entry:
        if entry.reused:
            log.info("measured before: %s", model.name)
        return _measured(model.name, entry.result)


def _hashes(asked: Questions) -> dict[str, Any]:
    splits = {"records": asked.records, "general": asked.general}
    tasks = {"tasks": asked.tasks, "general_tasks": asked.general_tasks}
    # A split's numbers, too: those that do not fit into the base's context were left out.
    hashes: dict[str, Any] = {kind: [split.sha256, split.numbers] for kind, split in splits.items() if split}
    hashes |= {kind: file.sha256 for kind, file in tasks.items() if file}
    return hashes | {"windows": asked.windows}


def _measured(name: str, found: dict[str, Any]) -> Measured:
    records, general, text = (Losses(**found[kind]) for kind in _LOSSES)
    tasks, general_tasks = ([Reply(**reply) for reply in found[kind]] for kind in _REPLIES)
    return Measured(name, records, general, text, tasks, general_tasks, found["answer_tokens"], found["answers_cut"])
