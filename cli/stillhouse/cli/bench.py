"""`stillhouse bench …`: the benchmarks of a checkout of the repository; they are not part of the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

from stillhouse.engine.errors import StillhouseError

app = typer.Typer(no_args_is_help=True)

# Whatever the script knows is passed on as it is, --help too.
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.callback()
def _group() -> None:
    """Measure stillhouse against its peers, side by side in one run.

    Example: stillhouse bench engine --quick
    """


@app.command(context_settings=_PASSED_ON)
def engine(context: typer.Context) -> None:
    """The engine against onnxruntime-genai, llama.cpp and OpenVINO.

    Example: stillhouse bench engine --setup all && stillhouse bench engine --quick
    """
    script = _benchmarks() / "engine.py"
    raise typer.Exit(subprocess.run([sys.executable, script, *context.args], check=False).returncode)


def _benchmarks() -> Path:
    """The folder benchmarks/ of the checkout that this code, or the working directory, lies in."""
    for folder in (*Path(__file__).resolve().parents, *Path.cwd().resolve().parents, Path.cwd()):
        if (folder / "benchmarks/engine.py").is_file() and (folder / "pyproject.toml").is_file():
            return folder / "benchmarks"
    raise StillhouseError(
        "the benchmarks are not installed: they are in the repository, not in the package",
        hint="run this in a checkout of stillhouse",
    )
