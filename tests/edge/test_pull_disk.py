"""`stillhouse edge pull` on a full or failing disk, through SIGKILL and lost power: whole and live, or nothing."""

from __future__ import annotations

import errno
import itertools
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

from stillhouse.edge import pulling
from stillhouse.engine.policy import set_live_versions

# FileServer and AddVersion are those of conftest.py, which is not to be imported.
FileServer = Any
AddVersion = Callable[..., Path]
Pull = Callable[..., int]
Truth = Callable[[Path], tuple[list[int], list[int]]]
MODEL = "tiny-fp16"


def test_without_space_nothing_is_fetched(
    served: FileServer, device: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pull: Pull
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
    pull: Pull,
    truth: Truth,
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
    served: FileServer,
    device: Path,
    number: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pull: Pull,
    truth: Truth,
) -> None:
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
    served: FileServer, device: Path, monkeypatch: pytest.MonkeyPatch, pull: Pull, truth: Truth
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
    served: FileServer, device: Path, pull: Pull, truth: Truth
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
