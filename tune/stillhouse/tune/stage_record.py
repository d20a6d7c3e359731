"""stages.json in a run's folder: what every stage was made from, what it came to, and how the last run went."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from stillhouse.build.cache import key_of
from stillhouse.engine.directory import sha256_of
from stillhouse.engine.durable import sync_directory, write_text
from stillhouse.engine.errors import StillhouseError

RECORD = "stages.json"
Status = Literal["done", "unchanged", "failed", "not run"]


@dataclass(frozen=True, slots=True)
class Done:
    """A stage that came to its end: its inputs by name, the hash of its result, and how long it took."""

    stage: str
    key: str
    inputs: dict[str, Any]
    result: str
    seconds: float
    finished: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a stage in the last run; `why` it ran, `error` why it failed."""

    stage: str
    status: Status
    key: str | None = None
    why: str | None = None
    error: str | None = None
    seconds: float | None = None


@dataclass(slots=True)
class Record:
    """Everything that was ever done in a run's folder, the newest last, and the outcomes of the last run."""

    done: list[Done] = field(default_factory=list)
    last_run: list[Outcome] = field(default_factory=list)

    def find(self, stage: str, key: str) -> Done | None:
        return next((done for done in reversed(self.done) if (done.stage, done.key) == (stage, key)), None)

    def latest(self, stage: str) -> Done | None:
        return next((done for done in reversed(self.done) if done.stage == stage), None)

    def drop(self, stage: str, key: str | None = None) -> None:
        """Forgets that the stage was done with the inputs of `key`, or with any."""
        self.done = [done for done in self.done if done.stage != stage or key not in (None, done.key)]

    def add(self, done: Done) -> None:
        self.drop(done.stage, done.key)
        self.done.append(done)


def read_record(run: Path) -> Record:
    """The record in `run`, an empty one where there is none. Raises StillhouseError where it cannot be read."""
    file = run / RECORD
    try:
        found = json.loads(file.read_text("utf-8"))
        return Record([Done(**done) for done in found["done"]], [Outcome(**each) for each in found["last_run"]])
    except FileNotFoundError:
        return Record()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StillhouseError(
            f"{file} cannot be read: {error}", hint="remove it: every stage begins anew, or finds its own result"
        ) from error


def write_record(run: Path, record: Record) -> None:
    """Puts stages.json in place whole: a crash leaves the one before, or this one."""
    beside = run / f".{RECORD}.new"
    write_text(beside, json.dumps({"schema": 1} | asdict(record), indent=1) + "\n")
    beside.replace(run / RECORD)
    sync_directory(run)


def digest(files: list[Path], folder: Path) -> str:
    """The hash of a stage's result. Raises OSError where a file of it is not there."""
    return key_of({_name(file, folder): sha256_of(file) for file in files})


def _name(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)


def what_changed(before: Done | None, inputs: dict[str, Any]) -> str:
    """In words, why a stage runs whose inputs are now `inputs`."""
    if before is None:
        return "not done yet"
    names = sorted({*before.inputs, *inputs})
    changed = [name for name in names if before.inputs.get(name) != inputs.get(name)]
    if not changed:
        return "its result is gone or was changed"
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    return f"changed: {', '.join(changed[:4])}{more}"
