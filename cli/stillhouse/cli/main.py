"""The entry point: loads the room of the subcommand that is called, prints errors as one line and a hint.

Exit codes: 0 done, 1 it failed, 2 it was asked for wrongly, 130 interrupted. Results go to stdout, the rest to stderr.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from stillhouse.cli.logs import add_log_options, set_up

INTERRUPTED = 130
# Name: where its function (or group of commands) lives, and the line that `stillhouse --help` says of it.
COMMANDS = {
    "init": ("stillhouse.build.commands:init", "Write a commented recipe.toml."),
    "data": ("stillhouse.tune.data_commands:app", "Turn raw records into a dataset to tune on."),
    "tune": ("stillhouse.tune.tune_commands:tune", "Train a LoRA adapter on a dataset, watched and resumable."),
    "evaluate": ("stillhouse.tune.evaluate_commands:evaluate", "Measure base, fine-tune and versions, with intervals."),
    "prune": ("stillhouse.tune.prune_commands:prune", "Take out heads and layers that matter least, heal, report."),
    "pipeline": ("stillhouse.tune.pipeline_commands:pipeline", "All of it from one recipe: data to a live version."),
    "build": ("stillhouse.build.commands:build", "Merge, export, quantize, prove and publish what a recipe names."),
    "versions": ("stillhouse.build.version_commands:versions", "List the versions of a model repository."),
    "inspect": ("stillhouse.build.version_commands:inspect", "Show what one version is and how it came to be."),
    "diff": ("stillhouse.build.version_commands:diff", "Show two versions side by side."),
    "remove": ("stillhouse.build.version_commands:remove", "Remove a version that is not live."),
    "serve": ("stillhouse.serve.commands:serve", "Serve a model repository with Triton over gRPC and HTTP."),
    "promote": ("stillhouse.serve.commands:promote", "Make a version of a model the one that answers."),
    "rollback": ("stillhouse.serve.commands:rollback", "Make the version live again that was live before."),
    "generate": ("stillhouse.client.commands:generate", "Ask a server one question and print the answer."),
    "chat": ("stillhouse.client.commands:chat", "Talk with a served model."),
    "edge": ("stillhouse.edge.commands:app", "Run a version on this device, without a server."),
    "loadtest": ("stillhouse.loadtest.commands:app", "Drive a server with Locust and print LLM metrics."),
    "bench": ("stillhouse.cli.bench:app", "Measure the engine against its peers."),
}
# The extras that bring what a room imports, where they are more than its own name.
EXTRAS = {"serve": "serve,triton,cpu", "edge": "edge,cpu", "bench": "dev"}


def main() -> None:
    """Runs the command line and exits the process with its code."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # What is no UTF-8 is refused by who reads the text, in a line, and not by Python.
        sys.stdin.reconfigure(errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A terminal that cannot show a character is no reason to end; who chose another handling has it.
        sys.stdout.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    set_up()
    called = arguments[0] if arguments else ""
    try:
        code = command_line(called)(list(arguments), prog_name="stillhouse", standalone_mode=False)
        if code == INTERRUPTED:
            print("interrupted", file=sys.stderr)
        return code if isinstance(code, int) else 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; without this the interpreter complains once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        return _say(f"{error.name} is not installed", f"pip install 'stillhouse[{_extra_of(called)}]'", 1)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = getattr(error, "hint", None) or ("free some disk space" if full else None)
        return _say(str(error), hint, getattr(error, "exit_code", 1))
    except Exception as error:
        if hasattr(error, "format_message"):
            return _wrong_usage(error)
        # Every room's errors carry a hint; anything else is a fault of ours and shows its trace.
        if not hasattr(error, "hint"):
            raise
        return _say(str(error), error.hint, getattr(error, "exit_code", 1))


def command_line(called: str) -> typer.Typer:
    """The whole grammar; only the room of the command that is `called` is imported, the others are their help line."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_root)
    for name, (target, line) in COMMANDS.items():
        if name != called:
            app.command(name, help=line)(lambda: None)
            continue
        module, attribute = target.split(":")
        found = getattr(importlib.import_module(module), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
    add_log_options(app)
    return app


def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """From a fine-tuned small language model to production: build, prove, serve and measure it.

    Example: stillhouse build recipe.toml && stillhouse serve
    """
    if version:
        from importlib.metadata import version as version_of

        print(version_of("stillhouse"))
        raise typer.Exit


def _extra_of(called: str) -> str:
    room = COMMANDS[called][0].split(".")[1]
    return EXTRAS.get(room, room)


def _wrong_usage(error: Any) -> int:
    """What typer says of a command line that it cannot read, in our form; of an empty one it has printed the help."""
    message = " ".join(str(error.format_message()).split()).rstrip(".")
    if not message:
        return 2
    context = getattr(error, "ctx", None)
    return _say(message, f"see '{context.command_path if context else 'stillhouse'} --help'", 2)


def _say(message: str, hint: str | None, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
