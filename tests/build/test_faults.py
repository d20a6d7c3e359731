"""Kills, full disks, Ctrl-C and neighbours: whole versions or none, and each a clear line."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from stillhouse.build import pipeline
from stillhouse.build.cache import cache_root
from stillhouse.build.recipe import load_recipe
from stillhouse.build.results import BuildResult
from stillhouse.build.worker import StageRun, _environment
from stillhouse.engine.directory import open_version, version_numbers
from stillhouse.engine.errors import StillhouseError

BUILD = [sys.executable, "-m", "stillhouse.cli.main", "build"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB; the tiny model's FP32 weights alone are 1.8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root mounts a small disk; the limit of a file's size is tested without")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.usefixtures("kept_cache")
def test_a_repository_whose_disk_is_full_gets_no_version_and_says_so(tiny_recipe: Path, small_disk: Path) -> None:
    (small_disk / "filling").write_bytes(b"\0" * 1_500_000)
    done = run([*BUILD, str(tiny_recipe), "--repository", str(small_disk / "repository")])
    one_error(done, "cannot publish into", "No space left on device", "free some disk space")
    assert list((small_disk / "repository").iterdir()) == []


@pytest.mark.slow
def test_a_cache_whose_disk_is_full_ends_the_build_in_a_line(
    tiny_recipe: Path, small_disk: Path, tmp_path: Path
) -> None:
    (small_disk / "filling").write_bytes(b"\0" * 1_500_000)
    done = run([*BUILD, str(tiny_recipe), "--repository", str(tmp_path / "repository")], XDG_CACHE_HOME=str(small_disk))
    one_error(done, "merge", "No space left on device", "free some disk space")
    assert not (tmp_path / "repository").exists()


@pytest.mark.usefixtures("kept_cache")
def test_a_limit_of_a_files_size_ends_the_build_in_a_line(tiny_recipe: Path, tmp_path: Path) -> None:
    """As a quota does: writing fails in the middle of a file, without a disk to mount."""
    limited = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)); "
    command = [sys.executable, "-c", limited + "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])", *BUILD[1:]]
    done = run([*command, str(tiny_recipe), "--repository", str(tmp_path / "repository")])
    one_error(done, "File too large", "free some disk space")
    assert not (tmp_path / "repository").exists()


def test_a_cache_that_cannot_be_written_is_named(tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run([*BUILD, str(tiny_recipe), "--repository", str(tmp_path / "r")], XDG_CACHE_HOME=str(tmp_path / "file"))
    one_error(done, "cannot write into the cache", "XDG_CACHE_HOME")


def test_ctrl_c_ends_a_build_with_130_and_leaves_no_process_and_no_version(
    tiny_recipe: Path, tmp_path: Path, wait_until: Callable[..., float]
) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    child = subprocess.Popen(
        [*BUILD, str(tiny_recipe), "--repository", str(tmp_path / "repository")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    began = time.monotonic()
    while not (workers := children_of(child.pid)) and time.monotonic() - began < 60:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=60)
    assert (child.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    assert workers
    wait_until(lambda: not any(map(runs, workers)))
    assert not (tmp_path / "repository").exists()
    (log,) = (tmp_path / "cache" / "stillhouse" / "builds").iterdir()
    assert json.loads((log / "build.json").read_text())["error"] == "KeyboardInterrupt"


@pytest.mark.slow
def test_two_builds_of_one_name_at_once_make_each_stage_once_and_both_get_versions(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [*BUILD, str(tiny_recipe), "--repository", str(tmp_path / "repository"), "--force", "--json"]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in "ab"]
    said = [child.communicate(timeout=300) for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    built = [json.loads(stdout) for stdout, _ in said]
    assert sorted(result["version"] for build in built for result in build["results"]) == [1, 1, 2, 2]
    merges = [stage["reused"] for build in built for stage in build["stages"] if stage["name"] == "merge"]
    assert sorted(merges) == [False, True]
    assert any(b"another process is making merge of the same inputs; waiting for it" in stderr for _, stderr in said)
    for model in ("tiny-fp16", "tiny-int8"):
        assert version_numbers(tmp_path / "repository" / model) == [1, 2]
        files = [open_version(tmp_path / "repository" / model / number).manifest.files for number in "12"]
        assert files[0] == files[1]


@pytest.mark.usefixtures("built")
def test_a_precision_that_is_added_does_not_merge_or_export_again(
    tiny_adapter: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    more = load_recipe(write_recipe(tiny_adapter, precisions='"fp16", "fp32"'))
    done = pipeline.build(more, tmp_path / "repository")
    assert {
        stage.name: stage.reused for stage in done.stages if not stage.name.startswith(("verify", "ask", "pub"))
    } == {
        "merge": True,
        "export fp32": True,
        "reference": False,
        "make fp16": True,
    }


@pytest.mark.usefixtures("built")
def test_an_error_takes_nothing_from_the_versions_before_it_and_every_stage_works_in_the_builds_own_folder(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage = pipeline.run_stage
    folders = set()

    def run(stage: str, arguments: dict[str, Any], **words: Any) -> StageRun:
        folders.add(words["temporary"])
        if stage == "fidelity" and "int8" in arguments["model"]:
            raise StillhouseError("the lights went out")
        return run_stage(stage, arguments, **words)

    monkeypatch.setattr(pipeline, "run_stage", run)
    heard: list[BuildResult] = []
    with pytest.raises(StillhouseError, match="the lights went out"):
        pipeline.build(load_recipe(tiny_recipe), tmp_path / "repository", on_result=heard.append)
    assert [(result.model, result.status) for result in heard] == [("tiny-fp16", "published")]
    log = max((cache_root() / "builds").iterdir(), key=lambda folder: folder.stat().st_mtime)
    record = json.loads((log / "build.json").read_text())
    assert [result["model"] for result in record["results"]] == ["tiny-fp16"]
    assert record["error"] == "the lights went out"
    (folder,) = folders
    assert folder.parent == cache_root() / "scratch"
    assert not folder.exists()


def test_a_stage_puts_its_temporary_files_where_it_is_told(tmp_path: Path) -> None:
    assert _environment(tmp_path)["TMPDIR"] == str(tmp_path)
    assert _environment(None).get("TMPDIR") == os.environ.get("TMPDIR")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_recipe_gives_the_same_bytes_from_an_empty_cache(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    """In other folders, too: neither a path nor a moment gets into a version; of the manifest the time differs."""
    seen = []
    for number in "12":
        home = tmp_path / f"home-{number}"
        shutil.copytree(tiny_base, home / "base")
        shutil.copytree(tiny_adapter, home / "adapter")
        recipe = home / "recipe.toml"
        head = 'name = "tiny"\nbase = "base"\nadapters = ["adapter"]\nprecisions = ["fp16", "int8", "int4"]\n'
        recipe.write_text(head + "[gate.int4]\nperplexity_ratio = 100\n")
        done = run([*BUILD, str(recipe), "--repository", str(home / "repository")], XDG_CACHE_HOME=str(home / "cache"))
        assert done.returncode == 0, done.stderr
        versions = sorted((home / "repository").glob("*/1"))
        assert len(versions) == 3
        files = {
            str(f.relative_to(home)): f.read_bytes() for v in versions for f in v.iterdir() if f.name != "manifest.json"
        }
        manifests = [json.loads((version / "manifest.json").read_text()) for version in versions]
        seen.append((files, [{key: value for key, value in m.items() if key != "created"} for m in manifests]))
    assert seen[0] == seen[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_builds_killed_at_ten_moments_lose_nothing(
    tiny_adapter: Path, write_recipe: Callable[..., Path], repo_root: Path, tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("kill_builds", repo_root / "benchmarks" / "kill_builds.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    done = script.kill_builds(write_recipe(tiny_adapter), tmp_path, kills=10, every=11)
    assert done["killed"] == 10, done


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def one_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """One line that says what went wrong and one that says what to do, exit 1, nothing on stdout."""
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def runs(process: int) -> bool:
    """False for one that has ended, too, and waits to be asked how."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def children_of(process: int) -> list[int]:
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False)
    return [int(word) for word in done.stdout.split()]
