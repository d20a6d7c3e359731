"""What a command prints of a run: figures on stdout, progress and warnings on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from stillhouse.loadtest.errors import RunFailed
from stillhouse.loadtest.report import token_table
from stillhouse.loadtest.run import LoadResult
from stillhouse.loadtest.timeline import Step


def show(
    result: LoadResult, save: Path | None, json_output: bool, steps: list[Step] | None = None, also: str = ""
) -> None:
    if sys.stderr.isatty():
        tell("")  # below the progress
    if save is not None:
        from stillhouse.loadtest.save import save_run  # matplotlib

        save_run(save, result, steps or [])
    print(json.dumps(result.to_json(), indent=2) if json_output else token_table([result.summary]))
    if also:
        print(also)
    if not json_output and result.queue is not None and result.queue.count > 0:
        print(
            f"queue time on the server: mean {result.queue.mean_ms:.1f} ms, p95 {result.queue.percentile_ms(95):.1f} ms"
        )
    if result.hint:
        tell(f"hint: {result.hint}")
    for problem in result.problems:
        tell(f"INVALID: the load generator could not keep up: {problem}")
    if result.ended_early:
        raise RunFailed(result.ended_early, hint="the figures above are of what came before")
    if not result.summary.requests:
        failed = ", ".join(f"{kind} {count}" for kind, count in sorted(result.summary.failures.items()))
        raise RunFailed(f"no request succeeded ({failed or 'none ended in time'})")


def progress(line: str) -> None:
    """One line that is written over again and again, where a person looks at it."""
    if sys.stderr.isatty():
        typer.echo(f"\r{line}\x1b[K", err=True, nl=False)


def tell(line: str) -> None:
    typer.echo(line, err=True)
