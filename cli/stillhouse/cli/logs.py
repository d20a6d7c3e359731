"""Logging for the command line: to stderr, as loud as --quiet and --verbose say."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

_QUIET = Annotated[bool, typer.Option("--quiet", help="Say only errors.")]
_VERBOSE = Annotated[bool, typer.Option("--verbose", help="Say more.")]


def set_up(level: int = logging.INFO) -> None:
    """Sends the project's log lines to stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("stillhouse").setLevel(level)


def add_log_options(app: typer.Typer) -> None:
    """Gives every command of `app`, and of the groups below it, --quiet and --verbose."""
    for command in app.registered_commands:
        # A group that is used once more in the same process has them already.
        if command.callback and "quiet" not in inspect.signature(command.callback).parameters:
            command.callback = _with_log_options(command.callback)
    for group in app.registered_groups:
        if group.typer_instance:
            add_log_options(group.typer_instance)


def _with_log_options(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        if quiet or verbose:
            set_up(logging.ERROR if quiet else logging.DEBUG)
        if quiet:
            # Read by the progress bars, which write to stderr without going through logging.
            os.environ["STILLHOUSE_QUIET"] = "1"
        return function(*args, **kwargs)

    signature = inspect.signature(function, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("quiet", _QUIET), ("verbose", _VERBOSE))
    ]
    wrapper.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]
    return wrapper
