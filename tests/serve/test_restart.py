"""The log of a server in whose place another comes."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.serve import restart
from stillhouse.serve.backoff import Backoff
from stillhouse.serve.errors import ServeError, ServerFailed
from stillhouse.serve.launcher import ServeOptions


def start_again(tmp_path: Path, log_file: Path, stop: threading.Event) -> None:
    before: Any = SimpleNamespace(stop=lambda **_: None, log_file=log_file, ports=None, openai_url=None)
    restart.restart(before, ServeOptions(tmp_path), ["a"], stop, Backoff())


def test_it_is_kept_and_a_link_such_as_dev_stdout_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: Any = SimpleNamespace()
    monkeypatch.setattr(restart, "start_server", lambda *_, **__: started)
    log_file, link = tmp_path / "log", tmp_path / "link"
    log_file.write_text("signal 6")
    link.symlink_to(log_file)
    start_again(tmp_path, link, threading.Event())
    assert link.is_symlink()
    start_again(tmp_path, log_file, threading.Event())
    assert (tmp_path / "log.1").read_text() == "signal 6"


def test_whoever_is_told_to_stop_does_not_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def start_server(*_: object, **__: object) -> None:
        stop.set()
        raise ServerFailed("it ended")

    monkeypatch.setattr(restart, "start_server", start_server)
    with pytest.raises(ServeError, match="stopped before the server was ready"):
        start_again(tmp_path, tmp_path / "log", stop)
