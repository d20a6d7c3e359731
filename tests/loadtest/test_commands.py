"""The commands as they stand in the docs, and what they refuse before they ask a server."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stillhouse.client import ConnectionFailed
from stillhouse.loadtest import commands
from stillhouse.loadtest.errors import BadInput

ROOT = Path(__file__).parent.parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "loadtest.md", Path(commands.__file__))
SAID = {
    " ".join(found.split())
    for page in PAGES
    for found in re.findall(
        r"^(?:    |.*`|    Example: )stillhouse (loadtest \w[^`#\n]*)", page.read_text("utf-8"), re.M
    )
}


@pytest.mark.parametrize("said", sorted(SAID))
def test_a_command_of_the_docs_is_one_that_only_lacks_its_server(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [re.sub(r"^localhost:\d+$", "localhost:1", word) for word in shlex.split(said)[1:]]
    error = CliRunner().invoke(commands.app, words, catch_exceptions=True).exception
    missing = isinstance(error, BadInput) and str(error).startswith("cannot read monday.json")
    assert isinstance(error, ConnectionFailed) or missing, f"{said}: {error!r}"


def test_the_docs_have_commands() -> None:
    assert {said.split()[1] for said in SAID} == {"run", "shape", "capacity", "compare", "diff"}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["run", "--users", "4", "--rate", "2"], "users are a closed loop and a rate is an open one"),
        (["run", "--rate", "inf"], "a rate is"),
        (["capacity", "--slo", "e2e_p95<1s", "--start", "inf"], "the search starts at a rate"),
        (["run", "--no-stream", "--slo", "ttft_p95<1s"], "--no-stream asks for none"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_server_is_asked(words: list[str], error: str) -> None:
    found = CliRunner().invoke(commands.app, [words[0], "localhost:1", *words[1:]]).exception
    assert isinstance(found, BadInput) and error in str(found)


def test_a_rate_may_be_said_a_second() -> None:
    found = CliRunner().invoke(commands.app, ["run", "localhost:1", "--rate", "2/s"]).exception
    assert isinstance(found, ConnectionFailed)
