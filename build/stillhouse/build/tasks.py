"""Tasks with known answers, a JSON object a line: what a fine-tune is for, measured and gated beside fidelity.

    {"prompt": "…", "choices": ["…", "…"], "answer": 1}     multiple choice; the answer is a place (from 0) or its text
    {"prompt": "…", "answer": "47 days", "max_tokens": 16}  exact match; a list names several answers that are right

`messages` in OpenAI's form may stand in place of `prompt`. A prompt is put as the user's turn of the chat template,
or as plain text where the model has none.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stillhouse.engine.errors import StillhouseError

_THINKING_ENDS = "</think>"
_EDGES = " .,;:!?\"'`*"


class Task(BaseModel):
    """One question and what is right; `choices` makes it multiple choice, else a greedy answer is compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    choices: list[str] | None = Field(default=None, min_length=2)
    answer: int | str | list[str]
    max_tokens: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _makes_sense(self) -> Task:
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("give prompt or messages, one of the two")
        if self.choices is not None:
            if isinstance(self.answer, list) or not all(self.choices):
                raise ValueError("choices are texts, and the answer is one of them or its place")
            if isinstance(self.answer, str) and self.choices.count(self.answer) != 1:
                raise ValueError(f"the answer {self.answer!r} is not one of the choices")
            if isinstance(self.answer, int) and not 0 <= self.answer < len(self.choices):
                raise ValueError(f"the answer {self.answer} is no place among {len(self.choices)} choices (from 0)")
        elif isinstance(self.answer, int) or not all(map(plain, self.answers)):
            raise ValueError("without choices the answer is a text, or a list of texts that are right")
        return self

    @property
    def answers(self) -> list[str]:
        """The texts that are right."""
        return self.answer if isinstance(self.answer, list) else [str(self.answer)]

    @property
    def right_choice(self) -> int:
        """The place of the right choice."""
        if self.choices is None:
            raise ValueError("this task has no choices")
        return self.answer if isinstance(self.answer, int) else self.choices.index(str(self.answer))

    @property
    def conversation(self) -> list[dict[str, str]]:
        return self.messages or [{"role": "user", "content": str(self.prompt)}]

    def is_right(self, text: str) -> bool:
        """Whether `text` is one of the answers, but for case, white space, marks at its ends, and what was thought."""
        return plain(text.rpartition(_THINKING_ENDS)[2]) in map(plain, self.answers)


@dataclass(frozen=True, slots=True)
class Tasks:
    """The tasks of a file, what it is called in a manifest, and its sha256."""

    label: str
    sha256: str
    tasks: list[Task]


def read_tasks(path: str) -> Tasks:
    """The tasks in `path`. Raises StillhouseError that names the first line which is none."""
    content = Path(path).read_bytes()
    tasks: list[Task] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            tasks.append(Task.model_validate(json.loads(line)))
        except ValidationError as error:
            raise _refused(path, number, _first_fault(error)) from None
        except (ValueError, RecursionError) as error:
            raise _refused(path, number, f"is not JSON: {error}") from None
    if not tasks:
        raise StillhouseError(
            f"evaluate.tasks: {path} has no task", hint='a line: {"prompt": "2 + 2 =", "answer": "4"}'
        )
    return Tasks(Path(path).name, hashlib.sha256(content).hexdigest(), tasks)


def plain(text: str) -> str:
    """`text` in one case, with single spaces, without marks at its ends."""
    return " ".join(text.casefold().split()).strip(_EDGES)


def _refused(path: str, number: int, why: str) -> StillhouseError:
    hint = 'a line: {"prompt": "…", "choices": ["…", "…"], "answer": 0} or {"prompt": "…", "answer": "…"}'
    return StillhouseError(f"evaluate.tasks: {path}: line {number} {why}", hint=hint)


def _first_fault(error: ValidationError) -> str:
    first: Any = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"][:1])
    if first["type"] == "extra_forbidden":
        return f"has an unknown key '{key}'"
    message = first["msg"].removeprefix("Value error, ")
    return f"has no '{key}'" if first["type"] == "missing" else f"is no task: {key + ': ' if key else ''}{message}"
