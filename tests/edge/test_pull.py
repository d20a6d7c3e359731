"""`stillhouse edge pull`: a newer version is fetched, tried and made live, whatever the network does."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.cli.main import run
from stillhouse.edge import smoke
from stillhouse.engine.policy import previous_version

# FileServer and AddVersion are those of conftest.py, which is not to be imported.
FileServer = Any
AddVersion = Callable[..., Path]
Pull = Callable[..., int]
Truth = Callable[[Path], tuple[list[int], list[int]]]
MODEL = "tiny-fp16"


def test_a_newer_version_is_fetched_tried_and_made_live(
    served: FileServer, device: Path, capsys: pytest.CaptureFixture[str], pull: Pull, truth: Truth
) -> None:
    assert pull(served, device) == 0
    assert capsys.readouterr().out == f"{MODEL}/2 is live, before it was 1\n"
    assert truth(device) == ([1, 2], [2])
    assert previous_version(device / MODEL) == 1
    asked = len(served.asked)
    assert pull(served, device) == 0
    assert "is live already" in capsys.readouterr().out
    assert len(served.asked) == asked + 2, "only the policy and the manifest are asked for"


def test_a_device_without_any_version_gets_its_first(
    served: FileServer, tmp_path: Path, pull: Pull, truth: Truth
) -> None:
    assert pull(served, tmp_path / "fresh") == 0
    assert truth(tmp_path / "fresh") == ([2], [2])


def test_a_folder_is_as_good_as_a_server(served: FileServer, device: Path, tmp_path: Path, truth: Truth) -> None:
    assert served
    assert run(["edge", "pull", str(tmp_path / "served" / MODEL / "2"), "--repository", str(device)]) == 0
    assert truth(device) == ([1, 2], [2])


def test_an_older_version_is_taken_only_where_it_is_named(
    served: FileServer,
    device: Path,
    add_version: AddVersion,
    capsys: pytest.CaptureFixture[str],
    pull: Pull,
    truth: Truth,
) -> None:
    add_version(device, 3)
    assert pull(served, device) == 0
    assert "3 stays live" in capsys.readouterr().out
    assert truth(device)[1] == [3]
    assert pull(served, device, model=f"{MODEL}/2") == 0
    assert truth(device)[1] == [2]


def test_a_server_without_a_policy_is_asked_for_its_listing(
    served: FileServer, device: Path, tmp_path: Path, pull: Pull, truth: Truth
) -> None:
    (tmp_path / "served" / MODEL / "config.pbtxt").unlink()
    assert pull(served, device) == 0
    assert truth(device)[1] == [2]


def test_a_broken_connection_is_resumed_where_it_broke(
    served: FileServer, device: Path, pull: Pull, truth: Truth
) -> None:
    served.breaks_after_bytes = 100_000
    assert pull(served, device) == 0
    ranges = [wanted for path, wanted in served.asked if wanted]
    assert ranges == ["bytes=100000-"]
    assert truth(device)[1] == [2]


def test_a_server_without_ranges_sends_it_all_again(served: FileServer, device: Path, pull: Pull, truth: Truth) -> None:
    served.breaks_after_bytes, served.knows_ranges = 100_000, False
    assert pull(served, device) == 0
    assert truth(device)[1] == [2]


def test_what_an_earlier_pull_left_damaged_is_fetched_again(
    served: FileServer, device: Path, tmp_path: Path, pull: Pull, truth: Truth
) -> None:
    left = device / MODEL / ".pull-2"
    left.mkdir()
    shutil.copy(tmp_path / "served" / MODEL / "2" / "manifest.json", left)
    (left / "model.onnx.data").write_bytes(b"\0" * 50_000)
    assert pull(served, device) == 0
    assert truth(device)[1] == [2]


def test_prune_keeps_the_live_version_and_the_one_before(
    served: FileServer, device: Path, tmp_path: Path, add_version: AddVersion, pull: Pull, truth: Truth
) -> None:
    add_version(device, 2)
    add_version(tmp_path / "served", 3)
    assert pull(served, device, "--prune") == 0
    assert truth(device) == ([2, 3], [3])


def test_a_device_whose_live_version_was_deleted_takes_what_it_pulls(
    served: FileServer, device: Path, add_version: AddVersion, pull: Pull, truth: Truth
) -> None:
    """The version before stays what one goes back to, also through --prune."""
    shutil.rmtree(add_version(device, 2))
    assert pull(served, device, "--prune") == 0
    assert truth(device) == ([1, 2], [2])
    assert previous_version(device / MODEL) == 1


def test_a_version_with_a_short_context_is_asked_within_it(device: Path) -> None:
    version = device / MODEL / "1"
    manifest = json.loads((version / "manifest.json").read_text())
    manifest["network"]["context_length"] = 64
    (version / "manifest.json").write_text(json.dumps(manifest))
    smoke.ask(version)


def test_a_clock_in_1970_changes_nothing_over_http(
    served: FileServer, device: Path, monkeypatch: pytest.MonkeyPatch, pull: Pull, truth: Truth
) -> None:
    monkeypatch.setattr(time, "time", lambda: 3600.0)
    assert pull(served, device) == 0
    assert truth(device)[1] == [2]
