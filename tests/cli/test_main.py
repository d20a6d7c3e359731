"""The command line, as a person types it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.cli.main import COMMANDS

HEAVY = ("torch", "onnxruntime", "transformers", "tritonclient", "locust", "numpy", "pydantic")


def stillhouse(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stillhouse.cli.main", *arguments], capture_output=True, text=True, timeout=120
    )


def test_help_imports_no_heavy_package_and_no_room() -> None:
    code = (
        "import sys\nfrom stillhouse.cli.main import run\nassert run(['--help']) == 0\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "rooms = [m for m in sys.modules if m.startswith('stillhouse.') and not m.startswith('stillhouse.cli')]\n"
        "print('LOADED', heavy + rooms)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("LOADED []")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_with_an_example(command: str) -> None:
    done = stillhouse(command, "--help")
    assert done.returncode == 0, done.stderr
    assert "Example:" in done.stdout


def test_an_unknown_command_is_wrong_usage() -> None:
    done = stillhouse("distill")
    assert done.returncode == 2
    assert "distill" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words", "hint"),
    [
        (["buidl"], "No such command 'buidl'. Did you mean 'build'?", "see 'stillhouse --help'"),
        (["build"], "Missing argument", "see 'stillhouse build --help'"),
        (["build", "a.toml", "b.toml"], "unexpected extra argument", "see 'stillhouse build --help'"),
        (["build", "a.toml", "--froce"], "No such option: --froce", "see 'stillhouse build --help'"),
        (["remove", "support-int4", "one"], "Invalid value for", "see 'stillhouse remove --help'"),
        (["edge", "nope"], "No such command 'nope'", "see 'stillhouse edge --help'"),
        (["build", "nowhere.toml"], "no recipe at nowhere.toml", "examples/support/recipe.toml is one"),
        (["versions", "--repository", "nowhere"], "nowhere is not a model repository", "stillhouse build"),
    ],
)
def test_wrong_usage_is_one_line_with_a_hint_and_exit_2(
    arguments: list[str], words: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = stillhouse(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    error, advice = done.stderr.strip().splitlines()
    assert error.startswith("error: ") and words in error
    assert advice.startswith("hint: ") and hint in advice


def test_no_command_prints_the_help_and_is_wrong_usage() -> None:
    assert stillhouse().returncode == 2


def test_the_version_is_printed() -> None:
    assert stillhouse("--version").stdout.strip().count(".") == 2


@pytest.mark.parametrize(
    ("encoding", "written"), [("ascii:strict", b"caf? 9 ?C"), ("utf-8:surrogateescape", b"caf\xe9 9 \xc2\xb0C")]
)
def test_only_what_the_output_would_refuse_is_replaced(encoding: str, written: bytes) -> None:
    """The C locale's way gives a name back the bytes that it has."""
    code = "from stillhouse.cli import main\nmain.run = lambda _: print('caf\\udce9 9 \\xb0C', end='')\nmain.main()"
    variables = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, written), done.stderr


def test_an_error_is_one_line_with_a_hint_and_no_trace(tmp_path: Path) -> None:
    done = stillhouse("edge", "generate", str(tmp_path), "--prompt", "hello")
    assert done.returncode == 1
    assert done.stdout == ""
    error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert "manifest.json" in error
    assert hint.startswith("hint: ")
