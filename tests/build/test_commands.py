"""versions and inspect: what is there, and whether it is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def test_versions_lists_what_is_there_and_verify_says_what_is_whole(repository: Path, cli: Cli) -> None:
    done = cli("versions", "--repository", repository, "--json")
    rows = json.loads(done.stdout)
    assert [(row["model"], row["version"], row["live"]) for row in rows] == [
        ("tiny-fp16", 1, True),
        ("tiny-int8", 1, True),
    ]
    assert "tiny-int8" in cli("versions", "--repository", repository).stdout
    weights = repository / "tiny-int8" / "1" / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    done = cli("versions", "--repository", repository, "--verify")
    assert done.returncode == 1
    assert "1 of 2 versions are not whole" in done.stderr
    assert "model.onnx.data" in done.stderr


def test_inspect_says_how_a_version_came_to_be(repository: Path, cli: Cli) -> None:
    directory = repository / "tiny-int8" / "1"
    assert json.loads(cli("inspect", directory, "--json").stdout)["model"] == "tiny-int8"
    assert "modules changed" in cli("inspect", directory).stdout
    done = cli("inspect", repository / "tiny-int8")
    assert done.returncode == 1
    assert "is not a version directory" in done.stderr


def test_a_dry_run_says_what_it_would_do_and_does_nothing(
    tiny_recipe: Path, tmp_path: Path, repository: Path, cli: Cli
) -> None:
    done = cli("build", tiny_recipe, "--repository", repository, "--dry-run", "--json")
    assert [version["existing"] for version in json.loads(done.stdout)["versions"]] == [1, 1]
    done = cli("build", tiny_recipe, "--repository", tmp_path / "new", "--dry-run")
    assert "a new version (converter)" in done.stdout
    assert "memory: about" in done.stdout
    assert list((tmp_path / "new").iterdir()) == []


def test_the_commands_are_imported_without_torch_or_onnx_runtime() -> None:
    code = (
        "import sys, stillhouse.build.commands, stillhouse.build.recipe\n"
        "print([name for name in ('torch', 'transformers', 'onnxruntime', 'onnx', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
