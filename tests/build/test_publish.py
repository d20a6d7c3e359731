"""Whole, immutable versions or none: re-hashed by other code, never twice, never after a failed gate or a kill."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.build import pipeline
from stillhouse.build.publish import go_live
from stillhouse.build.recipe import load_recipe
from stillhouse.engine.directory import open_version, version_numbers
from stillhouse.engine.policy import live_versions, previous_version

FILES = {
    "manifest.json",
    "model.onnx",
    "model.onnx.data",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "genai_config.json",
}
PUBLISH_FOR_EVER = """
import sys
from pathlib import Path
from stillhouse.build.publish import FILES, publish
from stillhouse.engine.manifest import Manifest
source, model = Path(sys.argv[1]), Path(sys.argv[2])
known = Manifest.model_validate_json((source / "manifest.json").read_bytes())
def manifest(version, files):
    return known.model_copy(update={"version": version, "files": files})
while True:
    print("ready", flush=True)
    publish({name: source / name for name in FILES}, manifest, model, probe=lambda _: None, force=True)
"""


def test_every_published_file_hashes_to_its_manifest_by_other_code(built: pipeline.Build) -> None:
    for result in built.results:
        assert result.path is not None
        assert {file.name for file in result.path.iterdir()} == FILES
        manifest = json.loads((result.path / "manifest.json").read_text())
        assert manifest["schema"] == 1
        assert (manifest["name"], manifest["model"], manifest["version"]) == ("tiny", result.model, 1)
        assert {entry["path"] for entry in manifest["files"]} == FILES - {"manifest.json"}
        sums = "".join(f"{entry['sha256']}  {entry['path']}\n" for entry in manifest["files"])
        subprocess.run(["sha256sum", "--check", "--quiet"], input=sums, text=True, cwd=result.path, check=True)
        assert all((result.path / entry["path"]).stat().st_size == entry["bytes"] for entry in manifest["files"])
        assert manifest["quality"]["tokens"] >= 8000
        assert manifest["quality"]["decode_tokens"] >= 256
        assert manifest["quality"]["passed"] is True
        assert manifest["merge"]["max_logit_difference"] <= 1e-4
        assert str(Path.home()) not in json.dumps(manifest)


def test_the_first_version_is_live_and_triton_needs_one_line(built: pipeline.Build) -> None:
    for result in built.results:
        assert result.path is not None
        config = (result.path.parent / "config.pbtxt").read_text()
        assert 'backend: "stillhouse"' in config
        assert json.loads((result.path.parent / "engine.json").read_text()) == {}
        assert live_versions(result.path.parent) == [1]


@pytest.mark.usefixtures("kept_cache")
def test_the_same_inputs_are_published_once(
    tiny_recipe: Path, repository: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    before = snapshot(repository)
    (repository / "tiny-int8" / ".new-dead").mkdir()  # a killed build's
    done = cli("build", tiny_recipe, "--repository", repository)
    assert done.returncode == 0, done.stderr
    assert not (repository / "tiny-int8" / ".new-dead").exists()
    assert "the same inputs are version 1; nothing new" in done.stdout
    assert snapshot(repository) == before


@pytest.mark.slow
@pytest.mark.usefixtures("kept_cache")
def test_force_makes_the_next_version_and_moves_the_live_one(tiny_recipe: Path, repository: Path) -> None:
    recipe = load_recipe(tiny_recipe).model_copy(update={"precisions": ["fp16"]})
    first = open_version(repository / "tiny-fp16" / "1")
    engine = repository / "tiny-fp16" / "engine.json"
    engine.write_text('{"max_num_seqs": 2}\n')
    (result,) = pipeline.build(recipe, repository, force=True, no_cache=True).results
    assert (result.status, result.version, result.live) == ("published", 2, [2])
    second = open_version(repository / "tiny-fp16" / "2")
    # Every stage was run again, and gave the same bytes.
    assert [file.sha256 for file in second.manifest.files] == [file.sha256 for file in first.manifest.files]
    assert engine.read_text() == '{"max_num_seqs": 2}\n'
    (kept,) = pipeline.build(recipe, repository, force=True, make_live=False).results
    assert (kept.version, kept.live) == (3, [2])


def test_a_version_that_is_there_becomes_the_live_one_by_itself(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
    (tmp_path / "config.pbtxt").write_text('backend: "stillhouse"\n')
    for number, previous in ((1, 2), (1, 2), (2, 1)):
        assert go_live(tmp_path / str(number)) == live_versions(tmp_path) == [number]
        assert previous_version(tmp_path) == previous


@pytest.mark.usefixtures("kept_cache")
def test_a_tampered_version_does_not_count_as_there(tiny_recipe: Path, repository: Path) -> None:
    recipe = load_recipe(tiny_recipe).model_copy(update={"precisions": ["fp16"]})
    weights = repository / "tiny-fp16" / "1" / "model.onnx.data"
    weights.write_bytes(b"\0" + weights.read_bytes()[1:-1] + b"\1")
    (result,) = pipeline.build(recipe, repository).results
    assert (result.status, result.version) == ("published", 2)


@pytest.mark.usefixtures("kept_cache")
def test_a_version_that_fails_its_gate_is_not_published_and_its_figures_are_kept(
    tiny_adapter: Path,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    gate = "[gate.int8]\nperplexity_ratio = 0.5\n"
    recipe = write_recipe(tiny_adapter, precisions='"fp16", "int8"', more=gate)
    done = cli("build", recipe, "--repository", tmp_path / "repository", "--json")
    assert done.returncode == 1
    assert "error: not published: tiny-int8: perplexity ratio" in done.stderr
    assert "hint: " in done.stderr
    assert [path.name for path in (tmp_path / "repository").iterdir()] == ["tiny-fp16"]
    printed = json.loads(done.stdout)
    failed = printed["results"][1]
    assert (failed["status"], failed["version"]) == ("failed", None)
    assert failed["perplexity_ratio"] > 0.5
    assert failed["figures"]["kl_mean"] > 0 and failed["figures"]["decode_top1_agreement"] > 0
    logged = json.loads((Path(printed["log"]) / "build.json").read_text())
    assert logged["results"][1]["perplexity_ratio"] == failed["perplexity_ratio"]


def test_a_killed_publish_leaves_whole_versions_and_the_next_clears_up(repository: Path, tmp_path: Path) -> None:
    source = shutil.copytree(repository / "tiny-fp16" / "1", tmp_path / "source")
    model = repository / "tiny-fp16"
    chance = random.Random(0)
    for _ in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", PUBLISH_FOR_EVER, str(source), str(model)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.08))
        child.kill()
        child.wait()
        child.stdout.close()
        check_whole(model)
    assert len(version_numbers(model)) > 1


def test_two_that_publish_at_once_both_get_versions(repository: Path, tmp_path: Path) -> None:
    source = shutil.copytree(repository / "tiny-fp16" / "1", tmp_path / "source")
    model = repository / "tiny-fp16"
    command = [sys.executable, "-c", PUBLISH_FOR_EVER, str(source), str(model)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [[child.stdout.readline() for _ in range(5)] for child in children if child.stdout]
    for child in children:
        child.kill()
        child.communicate()
    assert said == [["ready\n"] * 5] * 2
    check_whole(model)
    assert len(version_numbers(model)) >= 9  # the first, and four by each


@pytest.mark.slow
def test_a_build_killed_at_any_moment_leaves_whole_versions_and_the_next_succeeds(
    tiny_recipe: Path, repository: Path, kept_cache: Path
) -> None:
    recipe = load_recipe(tiny_recipe)
    command = [sys.executable, "-m", "stillhouse.cli.main", "build", str(tiny_recipe), "--force"]
    command += ["--repository", str(repository)]
    chance = random.Random(1)
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    whole_s = time.perf_counter() - began
    for _ in range(6):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.1, whole_s))
        child.send_signal(signal.SIGKILL)
        child.wait()
        for model in ("tiny-fp16", "tiny-int8"):
            check_whole(repository / model)
    last = {model: version_numbers(repository / model)[-1] for model in ("tiny-fp16", "tiny-int8")}
    results = pipeline.build(recipe, repository, force=True).results
    assert {result.model: result.version for result in results} == {name: n + 1 for name, n in last.items()}
    for model in last:
        assert [path.name for path in (repository / model).iterdir() if path.name.startswith(".")] == []
    assert list((kept_cache / "stillhouse" / "scratch").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root writes everywhere")
def test_a_read_only_repository_is_refused_before_anything_is_run(
    tmp_path: Path,
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    code = (
        "import sys; from pathlib import Path; from stillhouse.build.publish import check_repository\n"
        "from stillhouse.engine.errors import StillhouseError\n"
        "try:\n    check_repository(Path(sys.argv[1]))\n"
        "except StillhouseError as error:\n    print(error)\n"
    )
    as_nobody = ["setpriv", "--reuid", "65534", "--clear-groups"] if os.geteuid() == 0 else []
    # pytest keeps its folders to their owner; this one is to be reached, and not written.
    for parent in [*list(tmp_path.parents)[:3], tmp_path]:
        parent.chmod(0o755)
    done = subprocess.run([*as_nobody, sys.executable, "-c", code, str(locked)], capture_output=True, text=True)
    assert "cannot write into the repository" in done.stdout, done.stderr


def check_whole(model: Path) -> None:
    """Every numbered directory is a whole version, and the live one is there."""
    numbers = version_numbers(model)
    assert numbers == list(range(1, len(numbers) + 1))
    for number in numbers:
        assert open_version(model / str(number), verify=True).manifest.version == number
    assert set(live_versions(model)) <= set(numbers)


def snapshot(repository: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(repository)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in repository.rglob("*")
        if path.is_file()
    }
