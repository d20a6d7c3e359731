"""`stillhouse pipeline`: the stages one after another, each run where something that it reads has changed.

A run's folder holds stages.json and a folder for each stage and key, `tune-<key>`; the key is a hash of all that the
stage reads, results of earlier stages among them. What a killed stage had done so far is found there by the next run.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stillhouse.build.cache import key_of
from stillhouse.engine.directory import held
from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.stage_process import run_stage
from stillhouse.tune.stage_record import (
    Done,
    Outcome,
    Record,
    digest,
    read_record,
    what_changed,
    write_record,
)
from stillhouse.tune.stages import Stage

log = logging.getLogger(__name__)

STILLHOUSE = (sys.executable, "-m", "stillhouse.cli.main")


@dataclass(frozen=True, slots=True)
class Places:
    """Where a pipeline reads, runs and publishes."""

    recipe: Path
    run: Path
    repository: Path

    def folder(self, stage: str, key: str) -> Path:
        return self.run / f"{stage}-{key[:12]}"

    def command(self, stage: Stage, folders: dict[str, Path]) -> list[str]:
        """The arguments of a stage with its places in them."""
        named = {"recipe": self.recipe, "repository": self.repository} | folders
        return stage.command({name: path.resolve() for name, path in named.items()})


@dataclass(frozen=True, slots=True)
class Planned:
    """A stage, and why it would run: None where its result is there. Its key is not known before those it waits for."""

    stage: Stage
    why: str | None
    key: str | None


def plan(stages: Sequence[Stage], places: Places) -> list[Planned]:
    """What a run would do now."""
    record = read_record(places.run)
    results: dict[str, str] = {}
    planned: list[Planned] = []
    for stage in stages:
        waits = [name for name in stage.after if name not in results]
        if waits:
            planned.append(Planned(stage, f"reads the result of {', '.join(waits)}", None))
            continue
        inputs = _inputs(stage, results)
        done = _still_there(stage, record, inputs, places)
        if done is not None:
            results[stage.name] = done.result
        why = None if done else what_changed(record.latest(stage.name), inputs)
        planned.append(Planned(stage, why, key_of(inputs)))
    return planned


def run(
    stages: Sequence[Stage],
    places: Places,
    *,
    program: Sequence[str] = STILLHOUSE,
    on_end: Callable[[Record], object] = lambda _: None,
    again: Callable[[], Sequence[Stage]] | None = None,
) -> Record:
    """Runs what has to be run; returns the record, whose `last_run` says what became of each stage.

    `on_end` is given it, where a stage has failed, too. `again` reads the stages anew, after each that was run: what
    changed while it ran makes its result one of neither. Raises StillhouseError with a failed stage's own error: then
    the stages before it stand, those after it were not begun; and where another pipeline runs in the same folder.
    """
    places.run.mkdir(parents=True, exist_ok=True)
    busy = StillhouseError(f"another pipeline runs in {places.run}", hint="wait for it, or end it")
    with held(places.run, busy):
        record = read_record(places.run)
        record.last_run = [Outcome(stage.name, "not run") for stage in stages]
        done: dict[str, Done] = {}
        for place, stage in enumerate(stages):
            inputs = _inputs(stage, {name: each.result for name, each in done.items()})
            key = key_of(inputs)
            found = _still_there(stage, record, inputs, places)
            if found is not None:
                log.info("%s: unchanged", stage.name)
                done[stage.name] = found
                record.last_run[place] = Outcome(stage.name, "unchanged", key, seconds=found.seconds)
                continue
            why = what_changed(record.latest(stage.name), inputs)
            log.info("%s: %s", stage.name, why)
            if record.find(stage.name, key) is not None:  # what is left of its result would be taken for all of it
                shutil.rmtree(places.folder(stage.name, key), ignore_errors=True)
            record.drop(stage.name, None if stage.moves else key)  # so that it goes on, if it is killed now
            write_record(places.run, record)
            began = time.monotonic()
            try:
                done[stage.name] = _do(stage, inputs, done, places, program)
                if again is not None:
                    _refuse_changed(stage, again(), places.folder(stage.name, key))
            except (StillhouseError, OSError) as error:
                seconds = round(time.monotonic() - began, 1)
                record.last_run[place] = Outcome(stage.name, "failed", key, why, str(error), seconds)
                write_record(places.run, record)
                on_end(record)
                raise
            record.add(done[stage.name])
            seconds = done[stage.name].seconds
            record.last_run[place] = Outcome(stage.name, "done", key, why, seconds=seconds)
            write_record(places.run, record)
            log.info("%s: done, %.1f s", stage.name, seconds)
        write_record(places.run, record)
        on_end(record)
    return record


def _do(stage: Stage, inputs: dict[str, Any], done: dict[str, Done], places: Places, program: Sequence[str]) -> Done:
    """Runs the stage in its folder, and says what came of it."""
    began, key = time.monotonic(), key_of(inputs)
    folder = places.folder(stage.name, key)
    folder.mkdir(exist_ok=True)
    folders = {name: places.folder(name, each.key) for name, each in done.items()} | {"out": folder}
    run_stage(stage.name, [*program, *places.command(stage, folders)], folder)
    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
    result = digest(stage.result(folder), folder)
    return Done(stage.name, key, inputs, result, round(time.monotonic() - began, 1), finished)


def _refuse_changed(stage: Stage, now: Sequence[Stage], folder: Path) -> None:
    """Raises StillhouseError where the stage reads something else by now; then what it made goes."""
    reads = next((each.reads for each in now if each.name == stage.name), {})
    changed = [name for name in sorted({*stage.reads, *reads}) if stage.reads.get(name) != reads.get(name)]
    if changed:
        shutil.rmtree(folder, ignore_errors=True)
        raise StillhouseError(f"{stage.name}: {', '.join(changed[:4])} changed while it ran", hint="run it again")


def _inputs(stage: Stage, results: dict[str, str]) -> dict[str, Any]:
    """All that decides what the stage comes to, by name."""
    earlier = {f"{name}'s result": results[name] for name in stage.after}
    return stage.reads | earlier | {"stillhouse": version("stillhouse")}


def _still_there(stage: Stage, record: Record, inputs: dict[str, Any], places: Places) -> Done | None:
    """The stage as it was done with the same inputs, if its result is still what it was."""
    key = key_of(inputs)
    done = record.find(stage.name, key)
    folder = places.folder(stage.name, key)
    if done is not None and folder.is_dir():
        with contextlib.suppress(StillhouseError, OSError, ValueError, KeyError):
            if digest(stage.result(folder), folder) == done.result:
                return done
    return None
