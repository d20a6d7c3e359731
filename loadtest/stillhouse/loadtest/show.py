"""What a command prints of a run: figures on stdout, progress and warnings on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from stillhouse.loadtest.capacity import Capacity, capacity_table
from stillhouse.loadtest.compare import Compared, comparison_table
from stillhouse.loadtest.errors import RunFailed
from stillhouse.loadtest.report import token_table
from stillhouse.loadtest.run import LoadResult
from stillhouse.loadtest.timeline import Step


def show(result: LoadResult, save: Path | None, json_output: bool, also: str = "") -> None:
    """Prints a run's figures, then saves them; raises what cut it short."""
    if sys.stderr.isatty():
        tell("")  # below the progress
    print(json.dumps(result.to_json(), indent=2) if json_output else token_table([result.summary]))
    if also:
        print(also)
    if not json_output and result.queue is not None and result.queue.count > 0:
        print(
            f"queue time on the server: mean {result.queue.mean_ms:.1f} ms, p95 {result.queue.percentile_ms(95):.1f} ms"
        )
    for problem in result.problems:
        tell(f"INVALID: the load generator could not keep up: {problem}")
    _tell_more(result)
    if save is not None:
        from stillhouse.loadtest.save import save_run

        save_run(save, result)
    if result.failure is not None:
        raise result.failure
    if not result.summary.requests:
        raise RunFailed(f"no request succeeded ({result.summary.failures_said or 'none ended in time'})")


def show_capacity(capacity: Capacity, save: Path | None, json_output: bool) -> None:
    """Prints a search and saves it, with the last run at its end point, or else the last of all."""
    if not capacity.probes:
        return
    print(json.dumps(capacity.to_json(), indent=2) if json_output else capacity_table(capacity))
    last = (capacity.repeats or capacity.probes)[-1]
    _tell_more(last)
    if save is not None:
        from stillhouse.loadtest.save import save_run

        probes = sorted(capacity.probes, key=lambda probe: probe.load.rate)
        save_run(save, last, [Step(f"{p.load.rate:.2f}/s", p.summary) for p in probes], capacity.to_json())


def show_comparison(compared: Sequence[Compared], save: Path | None, json_output: bool) -> None:
    """Prints a comparison and saves it, where there is something to compare."""
    if not compared:
        return
    print(json.dumps([c.to_json() for c in compared], indent=2) if json_output else comparison_table(compared))
    _tell_more(compared[0].load)
    if save is not None:
        from stillhouse.loadtest.save import save_comparison

        save_comparison(save, compared)


def _tell_more(result: LoadResult) -> None:
    if result.hint:
        tell(f"hint: {result.hint}")
    if count := result.details.get("left_out"):
        tell(f"left out: {count} conversations without a question")


def progress(line: str) -> None:
    """One line that is written over again and again, where a person looks at it."""
    if sys.stderr.isatty():
        typer.echo(f"\r{line}\x1b[K", err=True, nl=False)


def tell(line: str) -> None:
    typer.echo(line, err=True)
