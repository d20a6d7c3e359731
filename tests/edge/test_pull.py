"""`stillhouse edge pull`: whole, tried and live, or nothing; whatever the network, the disk and the power do."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.cli.main import run
from stillhouse.edge import pulling
from stillhouse.engine.directory import open_version, version_numbers
from stillhouse.engine.policy import live_versions, previous_version, set_live_versions

# FileServer and AddVersion are those of conftest.py, which is not to be imported.
FileServer = Any
AddVersion = Callable[..., Path]
MODEL = "tiny-fp16"


@pytest.fixture
def served(tmp_path: Path, file_server: FileServer, add_version: AddVersion) -> FileServer:
    """A server on which version 2 is live."""
    add_version(tmp_path / "served", 1)
    add_version(tmp_path / "served", 2)
    return file_server


@pytest.fixture
def device(tmp_path: Path, add_version: AddVersion) -> Path:
    """The device's repository, with version 1 live."""
    add_version(tmp_path / "device", 1)
    return tmp_path / "device"


def pull(server: FileServer, device: Path, *more: str, model: str = MODEL) -> int:
    return run(["edge", "pull", f"{server.url}/{model}", "--repository", str(device), *more])


def truth(device: Path) -> tuple[list[int], list[int]]:
    """Versions there and live, each of the live ones whole."""
    model = device / MODEL
    live = live_versions(model)
    for number in live:
        open_version(model / str(number))
    return version_numbers(model), live


def test_a_newer_version_is_fetched_tried_and_made_live(
    served: FileServer, device: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pull(served, device) == 0
    assert capsys.readouterr().out == f"{MODEL}/2 is live, before it was 1\n"
    assert truth(device) == ([1, 2], [2])
    assert previous_version(device / MODEL) == 1
    asked = len(served.asked)
    assert pull(served, device) == 0
    assert "is live already" in capsys.readouterr().out
    assert len(served.asked) == asked + 2, "only the policy and the manifest are asked for"


def test_a_device_without_any_version_gets_its_first(served: FileServer, tmp_path: Path) -> None:
    assert pull(served, tmp_path / "fresh") == 0
    assert truth(tmp_path / "fresh") == ([2], [2])


def test_a_folder_is_as_good_as_a_server(served: FileServer, device: Path, tmp_path: Path) -> None:
    assert served
    assert run(["edge", "pull", str(tmp_path / "served" / MODEL / "2"), "--repository", str(device)]) == 0
    assert truth(device) == ([1, 2], [2])


def test_an_older_version_is_taken_only_where_it_is_named(
    served: FileServer, device: Path, add_version: AddVersion, capsys: pytest.CaptureFixture[str]
) -> None:
    add_version(device, 3)
    assert pull(served, device) == 0
    assert "3 stays live" in capsys.readouterr().out
    assert truth(device)[1] == [3]
    assert pull(served, device, model=f"{MODEL}/2") == 0
    assert truth(device)[1] == [2]


def test_a_server_without_a_policy_is_asked_for_its_listing(served: FileServer, device: Path, tmp_path: Path) -> None:
    (tmp_path / "served" / MODEL / "config.pbtxt").unlink()
    assert pull(served, device) == 0
    assert truth(device)[1] == [2]


def test_a_broken_connection_is_resumed_where_it_broke(served: FileServer, device: Path) -> None:
    served.breaks_after_bytes = 100_000
    assert pull(served, device) == 0
    ranges = [wanted for path, wanted in served.asked if wanted]
    assert ranges == ["bytes=100000-"]
    assert truth(device)[1] == [2]


def test_a_server_without_ranges_sends_it_all_again(served: FileServer, device: Path) -> None:
    served.breaks_after_bytes, served.knows_ranges = 100_000, False
    assert pull(served, device) == 0
    assert truth(device)[1] == [2]


def test_what_an_earlier_pull_left_damaged_is_fetched_again(served: FileServer, device: Path, tmp_path: Path) -> None:
    left = device / MODEL / ".pull-2"
    left.mkdir()
    shutil.copy(tmp_path / "served" / MODEL / "2" / "manifest.json", left)
    (left / "model.onnx.data").write_bytes(b"\0" * 50_000)
    assert pull(served, device) == 0
    assert truth(device)[1] == [2]


def test_a_changed_byte_is_refused_and_the_old_one_stays(
    served: FileServer, device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "served" / MODEL / "2" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert pull(served, device) == 1
    said = capsys.readouterr().err
    assert "model.onnx.data is not what its manifest says" in said and "Traceback" not in said
    assert truth(device) == ([1], [1])
    assert not (device / MODEL / ".pull-2" / "model.onnx.data").exists()


def spoil(version: Path) -> None:
    (version / "model.onnx").write_bytes(b"no graph")


def test_a_version_that_does_not_answer_is_not_taken(
    served: FileServer, device: Path, tmp_path: Path, add_version: AddVersion, capsys: pytest.CaptureFixture[str]
) -> None:
    add_version(tmp_path / "served", 3, spoil)
    assert pull(served, device) == 1
    said = capsys.readouterr().err
    assert "does not answer" in said and "version 1 stays live" in said
    assert truth(device) == ([1], [1])
    assert not list((device / MODEL).glob(".pull-*[0-9]"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 5}, "says that it is version 5"),
        ({"model": "../evil"}, "a name that is none"),
        ({"files": [{"path": "../../x", "bytes": 1, "sha256": "0" * 64}]}, "a name that is none"),
        ({"schema": 9}, "does not follow schema 1"),
    ],
)
def test_a_manifest_that_is_not_to_be_trusted_is_refused(
    served: FileServer, device: Path, tmp_path: Path, change: dict[str, Any], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "served" / MODEL / "2" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert pull(served, device) == 1
    assert said in capsys.readouterr().err
    assert truth(device) == ([1], [1])


def test_a_version_of_the_same_number_that_differs_is_refused(
    served: FileServer, device: Path, add_version: AddVersion, capsys: pytest.CaptureFixture[str]
) -> None:
    version = add_version(device, 2)
    (version / "manifest.json").write_text((version / "manifest.json").read_text() + " ")
    assert pull(served, device) == 1
    assert "differs from the server's version 2" in capsys.readouterr().err


def test_prune_keeps_the_live_version_and_the_one_before(
    served: FileServer, device: Path, tmp_path: Path, add_version: AddVersion
) -> None:
    add_version(device, 2)
    add_version(tmp_path / "served", 3)
    assert pull(served, device, "--prune") == 0
    assert truth(device) == ([2, 3], [3])


def test_without_space_nothing_is_fetched(
    served: FileServer, device: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert pull(served, device) == 1
    assert "0 MB are free" in capsys.readouterr().err
    assert not any("model.onnx" in path for path, _ in served.asked)


def test_a_disk_that_fills_up_is_said_in_a_line_and_left_as_it_was(
    served: FileServer,
    tmp_path: Path,
    add_version: AddVersion,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    version = served.url and tmp_path / "served" / MODEL / "2"
    size = sum(file.stat().st_size for file in version.iterdir())
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "none", str(small)]
    if os.getuid() or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        add_version(small, 1)
        # Something else takes the space while the files come.
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 10**9))
        assert pull(served, small) == 1
        captured = capsys.readouterr().err
        assert "no space is left" in captured and "Traceback" not in captured
        assert truth(small) == ([1], [1])
        assert not list((small / MODEL).glob(".pull-*[0-9]"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "no space is left"), (errno.EROFS, "is on a read-only file system")]
)
def test_a_disk_that_cannot_be_written_is_said_in_a_line(
    served: FileServer, device: Path, number: int, said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fails(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    assert pull(served, device) == 1
    captured = capsys.readouterr().err
    assert said in captured and "Traceback" not in captured
    monkeypatch.undo()
    assert truth(device) == ([1], [1])
    assert pull(served, device) == 0
    assert truth(device)[1] == [2]


def test_a_clock_in_1970_changes_nothing_over_http(
    served: FileServer, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 3600.0)
    assert pull(served, device) == 0
    assert truth(device)[1] == [2]


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("http://127.0.0.1:1/tiny-fp16", 1, "cannot be fetched"),
        ("ftp://host/x", 2, "neither an address nor a folder"),
        ("support-int4", 2, "neither an address nor a folder"),
    ],
)
def test_an_address_that_does_not_do_is_said_in_a_line(
    device: Path, source: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["edge", "pull", source, "--repository", str(device)]) == code
    captured = capsys.readouterr().err
    assert said in captured and "Traceback" not in captured


def test_a_model_that_the_server_does_not_have_is_said_in_a_line(
    served: FileServer, device: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pull(served, device, model="nobody") == 2
    assert "tells of no version" in capsys.readouterr().err


def test_two_pulls_at_once_do_not_mix(served: FileServer, device: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pulling._alone(device / MODEL):
        assert pull(served, device) == 1
    assert "another pull" in capsys.readouterr().err


def dies_before(step: int) -> None:
    """Has this process end, as if the power went, before its fsync or rename number `step`."""
    done = itertools.count()

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if next(done) == step:
                os._exit(9)
            return function(*arguments)

        return call

    os.fsync = dying(os.fsync)
    for name in ("rename", "replace"):
        setattr(Path, name, dying(getattr(Path, name)))


def test_power_lost_before_any_fsync_or_rename_leaves_a_whole_version_live(
    served: FileServer, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "check_answers", lambda _: None)
    states = []
    for step in itertools.count():
        child = os.fork()
        if child == 0:
            dies_before(step)
            os._exit(pull(served, device))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        states.append(truth(device))
        if code == 0:
            break
        assert code == 9
        # From the beginning again; after the last rename what is left undone is an fsync.
        if states[-1][1] == [2]:
            set_live_versions(device / MODEL, [1])
        for half in (*(device / MODEL).glob(".pull-*[0-9]"), device / MODEL / "2"):
            shutil.rmtree(half, ignore_errors=True)
    # Between its two renames the new version is there and not live.
    assert ([1, 2], [1]) in states
    assert states[-1] == ([1, 2], [2])
    assert len(states) > 10


def test_killed_at_any_moment_a_whole_version_is_live_and_the_next_pull_goes_on(
    served: FileServer, device: Path
) -> None:
    served.bytes_per_s = 2e6
    command = [sys.executable, "-m", "stillhouse.cli.main", "edge", "pull", f"{served.url}/{MODEL}"]
    choose = random.Random(7)
    for _ in range(3):
        process = subprocess.Popen([*command, "--repository", str(device)], stderr=subprocess.DEVNULL)
        time.sleep(choose.uniform(0.3, 2.5))
        process.kill()
        process.wait()
        assert truth(device)[1] in ([1], [2])
    served.bytes_per_s = None
    assert pull(served, device) == 0
    assert truth(device) == ([1, 2], [2])
