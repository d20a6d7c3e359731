"""versions and inspect: what is there, and whether it is whole."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.build import commands, picture, pipeline
from stillhouse.build.results import Build, BuildResult
from stillhouse.engine.errors import StillhouseError

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def test_versions_lists_what_is_there_and_verify_says_what_is_whole(repository: Path, cli: Cli) -> None:
    done = cli("versions", "--repository", repository, "--json")
    rows = json.loads(done.stdout)
    assert [(row["model"], row["version"], row["live"]) for row in rows] == [
        ("tiny-fp16", 1, True),
        ("tiny-int8", 1, True),
    ]
    (repository / "postprocessing" / "1").mkdir(parents=True)
    (repository / "postprocessing" / "config.pbtxt").write_text('backend: "python"\n')
    assert "tiny-int8" in (listed := cli("versions", "--repository", repository).stdout)
    assert "postprocessing" not in listed, "of another backend: it has no versions of ours"
    weights = repository / "tiny-int8" / "1" / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    done = cli("versions", "--repository", repository, "--verify")
    assert done.returncode == 1
    assert "1 of 2 versions are not whole" in done.stderr
    assert "model.onnx.data" in done.stderr


def test_inspect_says_how_a_version_came_to_be(repository: Path, cli: Cli) -> None:
    directory = repository / "tiny-int8" / "1"
    assert json.loads(cli("inspect", directory, "--json").stdout)["model"] == "tiny-int8"
    said = cli("inspect", directory).stdout
    assert "modules changed" in said
    assert "rtn, blocks of 32" in said
    done = cli("inspect", repository / "tiny-int8")
    assert done.returncode == 1
    assert "is not a version directory" in done.stderr
    for wrong in (["inspect", repository / "none"], ["inspect"], ["diff", directory, repository / "none"]):
        done = cli(*wrong)
        assert done.returncode == 2
        assert "hint: " in done.stderr


def test_the_schema_in_the_docs_is_current_and_a_manifest_follows_it(
    repository: Path, repo_root: Path, cli: Cli
) -> None:
    written = (repo_root / "docs" / "manifest.schema.json").read_text("utf-8")
    assert cli("inspect", "--schema").stdout == written, "stillhouse inspect --schema > docs/manifest.schema.json"
    schema = json.loads(written)
    manifest = json.loads((repository / "tiny-int8" / "1" / "manifest.json").read_text())
    assert set(schema["required"]) <= set(manifest)
    assert set(manifest) <= set(schema["properties"])
    quality = schema["$defs"]["QualityRecord"]["properties"]
    assert set(manifest["quality"]) <= set(quality)


def test_diff_shows_two_versions_side_by_side(repository: Path, cli: Cli) -> None:
    left, right = repository / "tiny-fp16" / "1", repository / "tiny-int8" / "1"
    printed = json.loads(cli("diff", left, right, "--json").stdout)
    rows = {row["key"]: row for row in printed["rows"]}
    assert (rows["precision"]["left"], rows["precision"]["right"], rows["precision"]["same"]) == ("fp16", "int8", False)
    assert rows["quality.perplexity_ratio"]["left"] != rows["quality.perplexity_ratio"]["right"]
    assert rows["version"]["same"] is True
    assert "file model.onnx.data" in rows
    assert (rows["quantization.method"]["left"], rows["quantization.method"]["right"]) == (None, "rtn")
    assert not any(key.startswith("base.") for key in rows)  # the same on both sides
    assert "quality.perplexity_ratio" in cli("diff", left, right).stdout
    same = json.loads(cli("diff", left, left, "--json").stdout)
    assert all(row["same"] for row in same["rows"])


def test_remove_takes_a_version_whole_but_never_the_live_one(repository: Path, cli: Cli) -> None:
    model = repository / "tiny-fp16"
    done = cli("remove", "tiny-fp16", "1", "--repository", repository)
    assert done.returncode == 1
    assert "tiny-fp16 version 1 is live" in done.stderr
    shutil.copytree(model / "1", model / "2")
    shutil.copytree(model / "1", model / ".removed-by-one-that-died")
    done = cli("remove", "tiny-fp16", "2", "--repository", repository)
    assert done.returncode == 0, done.stderr
    assert "tiny-fp16 version 2 is removed" in done.stdout
    assert sorted(path.name for path in model.iterdir()) == ["1", "config.pbtxt", "engine.json"]
    for wrong, words in (
        (["tiny-fp16", "2"], "versions there: 1"),
        (["tiny-fp8", "1"], "models there: tiny-fp16, tiny-int8"),
    ):
        done = cli("remove", *wrong, "--repository", repository)
        assert done.returncode == 2
        assert words in done.stderr


@pytest.mark.usefixtures("kept_cache")
def test_a_build_leaves_a_picture_and_a_table(tiny_recipe: Path, repository: Path, cli: Cli, tmp_path: Path) -> None:
    weights = repository / "tiny-fp16" / "1" / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")  # so that something is to be built
    done = cli("build", tiny_recipe, "--repository", repository, "--output", tmp_path / "saved")
    assert done.returncode == 0, done.stderr
    assert re.search(r"check: \d+\.\d s\n.*\[1/8\] merge: reused", done.stderr)
    for word in ("tiny-fp16", "tiny-int8", "there already", "published", "greedy"):
        assert word in done.stdout
    log = Path(done.stdout.rpartition("log, figures and picture: ")[2].strip())
    assert (log / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "saved" / "quality.png").read_bytes() == (log / "quality.png").read_bytes()
    saved = json.loads((tmp_path / "saved" / "build.json").read_text())["results"]
    assert [(result["model"], result["version"]) for result in saved] == [("tiny-fp16", 2), ("tiny-int8", 1)]
    picture = (log / "quality.svg").read_text()
    for label in ("fp16 v2", "fp16 v1", "int8 v1", "perplexity ratio to the FP32 merge"):
        assert f"<!-- {label} -->" in picture


def test_what_was_built_before_an_error_is_still_shown(
    built: Build,
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def build(*_: Any, on_result: Callable[[BuildResult], None], **__: Any) -> Build:
        on_result(built.results[0])
        raise StillhouseError("the lights went out")

    monkeypatch.setattr(pipeline, "build", build)
    with pytest.raises(StillhouseError, match="the lights went out"):
        commands.build(tiny_recipe, tmp_path / "repository")
    shown = capsys.readouterr().out
    assert "tiny-fp16" in shown
    assert "tiny-int8" not in shown


def test_a_picture_or_a_folder_that_cannot_be_written_takes_nothing_from_the_table(
    built: Build,
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline, "build", lambda *_, **__: built)
    monkeypatch.setattr(picture, "draw", full)
    (tmp_path / "taken").write_text("", "utf-8")
    with pytest.raises(StillhouseError, match=r"--output .*taken: cannot be written: File exists"):
        commands.build(tiny_recipe, tmp_path / "repository", output=tmp_path / "taken")
    assert "tiny-fp16" in capsys.readouterr().out
    assert "the picture could not be drawn: [Errno 28] No space left on device" in caplog.text


def test_a_line_reporter_says_how_much_is_done_and_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from stillhouse.build import progress

    clock = iter([100.0, 105.0, 130.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    caplog.set_level("INFO", "stillhouse")
    reporter = progress.LineReporter()
    reporter.stage("make int4", 3, 9)
    reporter.share(0.1)
    reporter.share(0.25)
    reporter.done("40.0 s, 0.5 GB")
    assert caplog.messages == ["[3/9] make int4: 25%, about 90 s left", "[3/9] make int4: 40.0 s, 0.5 GB"]


def test_a_dry_run_says_what_it_would_do_and_does_nothing(
    tiny_recipe: Path, tmp_path: Path, repository: Path, cli: Cli
) -> None:
    done = cli("build", tiny_recipe, "--repository", repository, "--dry-run", "--json")
    assert [version["existing"] for version in json.loads(done.stdout)["versions"]] == [1, 1]
    done = cli("build", tiny_recipe, "--repository", tmp_path / "new", "--dry-run")
    assert "a new version (converter)" in done.stdout
    assert "memory: about" in done.stdout
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("", "utf-8")
    for place, words in (("file/sub", "is a file, not a model repository"), ("n" * 300, "File name too long")):
        done = cli("build", tiny_recipe, "--repository", tmp_path / place, "--dry-run")
        assert (done.returncode, words in done.stderr) == (1, True), done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "repository"] == ["file"]


def test_the_commands_are_imported_without_torch_or_onnx_runtime() -> None:
    code = (
        "import sys, stillhouse.build.commands, stillhouse.build.recipe\n"
        "print([name for name in ('torch', 'transformers', 'onnxruntime', 'onnx', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
