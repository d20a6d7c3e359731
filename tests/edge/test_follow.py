"""`stillhouse edge serve MODEL`: it follows what is live, drops no request, and goes back from what does not answer."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from stillhouse.edge.following import Follower, Place, load_live
from stillhouse.engine.directory import locked
from stillhouse.engine.errors import VersionError
from stillhouse.engine.model import LanguageModel
from stillhouse.engine.policy import live_versions, set_live_versions

AddVersion = Callable[..., Path]
WaitUntil = Callable[..., float]
MODEL = "tiny-fp16"
BODY = {"model": MODEL, "prompt": "one two three", "max_tokens": 40, "temperature": 0, "ignore_eos": True}


@dataclass
class Served:
    """A running `edge serve`."""

    process: subprocess.Popen[str]
    url: str

    def version(self) -> int:
        return int(httpx.get(f"{self.url}/models/{MODEL}", timeout=30).json()["version"])


@contextlib.contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Served]:
    command = [sys.executable, "-m", "stillhouse.cli.main", "edge", "serve", *arguments, "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    ) as process:
        try:
            assert process.stdout is not None
            url = next(found[1] for line in process.stdout if (found := re.match(r"openai +(\S+)", line)))
            yield Served(process, url)
        finally:
            process.kill()


def spoil(version: Path) -> None:
    (version / "model.onnx").write_bytes(b"no graph")


@pytest.fixture
def repository(tmp_path: Path, add_version: AddVersion) -> Path:
    add_version(tmp_path / "repository", 1)
    return tmp_path / "repository"


def switch(repository: Path, number: int, previous: int) -> None:
    with locked(repository / MODEL):
        set_live_versions(repository / MODEL, [number], previous=previous)


def test_a_switch_drops_no_request_and_a_version_that_does_not_answer_is_left_again(
    repository: Path, add_version: AddVersion, wait_until: WaitUntil
) -> None:
    with serving(str(repository / MODEL)) as served:
        statuses, ended = list[int](), threading.Event()

        def ask() -> None:
            with httpx.Client(timeout=60) as client:
                while not ended.is_set():
                    statuses.append(client.post(f"{served.url}/completions", json=BODY).status_code)

        asking = [threading.Thread(target=ask) for _ in range(2)]
        for thread in asking:
            thread.start()
        assert served.version() == 1
        add_version(repository, 2)
        wait_until(lambda: served.version() == 2, timeout_s=60)
        before = len(statuses)
        wait_until(lambda: len(statuses) > before + 4, timeout_s=60)
        add_version(repository, 3, spoil)
        wait_until(lambda: live_versions(repository / MODEL) == [2], timeout_s=60)
        assert served.version() == 2
        ended.set()
        for thread in asking:
            thread.join()
        assert set(statuses) == {200}
        served.process.send_signal(signal.SIGTERM)
        _, said = served.process.communicate(timeout=60)
    assert served.process.returncode == 0
    assert f"version 3 of {MODEL} is not taken" in said


def test_an_asking_that_was_ended_says_nothing_against_a_version(
    repository: Path, add_version: AddVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a systemd unit ends whoever asks the new version, too."""
    add_version(repository, 2)
    ended = subprocess.CompletedProcess[str]([], -signal.SIGTERM, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    place = Place(repository / MODEL, follows=True)
    generator: Any = types.SimpleNamespace(version_of=lambda _: 1)
    Follower({MODEL: place}, generator, pytest.fail)._look(MODEL, place)
    assert live_versions(repository / MODEL) == [2]


def test_where_neither_version_loads_the_live_ones_fault_is_told(repository: Path, add_version: AddVersion) -> None:
    add_version(repository, 2)

    def load(path: Path) -> LanguageModel:
        raise VersionError(f"not {path.name}")

    with pytest.raises(VersionError, match="not 2"):
        load_live(Place(repository / MODEL, follows=True), load)
    assert live_versions(repository / MODEL) == [2]


def test_a_live_version_that_does_not_load_at_the_start_is_left_for_the_one_before(
    repository: Path, add_version: AddVersion
) -> None:
    add_version(repository, 2, spoil)
    with serving(str(repository / MODEL)) as served:
        assert served.version() == 1
    assert live_versions(repository / MODEL) == [1]


def test_one_version_that_is_named_is_served_whatever_is_live(repository: Path, add_version: AddVersion) -> None:
    add_version(repository, 2)
    with serving(str(repository / MODEL / "1")) as served:
        assert served.version() == 1


def test_systemd_hears_ready_alive_and_stopping(repository: Path, tmp_path: Path, orin_nano: Path) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(address))
        systemd.settimeout(60)
        heard = {"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "600000", "STILLHOUSE_EDGE_ROOT": str(orin_nano)}
        with serving(str(repository / MODEL), **heard) as served:
            assert systemd.recv(1000).startswith(b"READY=1")
            assert [systemd.recv(1000) for _ in range(2)] == [b"WATCHDOG=1"] * 2
            metrics = httpx.get(served.url.removesuffix("/v1") + "/metrics").text
            served.process.send_signal(signal.SIGTERM)
            said = b""
            while said != b"STOPPING=1":
                said = systemd.recv(1000)
    assert "stillhouse_edge_power_total_watts 5.0" in metrics
