"""What a model's process has under way, as the others read it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stillhouse.serve.under_way import CountedSender, UnderWay, told_under_way

FINAL = 1


class Sender:
    def send(self, response: Any = None, flags: int = 0) -> None:  # noqa: ARG002
        if response == "unsendable":
            raise ValueError(response)

    def is_cancelled(self) -> bool:
        return False


def test_a_request_is_under_way_until_its_final_response_has_been_sent(tmp_path: Path) -> None:
    under_way = UnderWay(tmp_path)
    first, second = (CountedSender(Sender(), under_way, FINAL) for _ in range(2))
    assert told_under_way(tmp_path) == {os.getpid(): 2}
    first.send("one")
    with pytest.raises(ValueError, match="unsendable"):
        first.send("unsendable", flags=FINAL)
    assert told_under_way(tmp_path) == {os.getpid(): 2}
    first.send("an error in its place", flags=FINAL)
    second.send(flags=FINAL)
    assert told_under_way(tmp_path) == {os.getpid(): 0}
    under_way.close()
    assert told_under_way(tmp_path) == {}


def test_what_was_under_way_is_known_after_a_sigkill(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from stillhouse.serve.under_way import UnderWay;"
        "u = UnderWay(Path(sys.argv[1])); u.add(1); u.add(1); u.add(-1); os.kill(os.getpid(), 9)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    assert process.wait(30) == -signal.SIGKILL
    assert told_under_way(tmp_path) == {process.pid: 1}


def test_without_a_directory_or_with_one_that_cannot_be_written_nobody_is_told(tmp_path: Path) -> None:
    for directory in (None, tmp_path / "missing"):
        under_way = UnderWay(directory)
        CountedSender(Sender(), under_way, FINAL).send(flags=FINAL)
        under_way.close()
    assert told_under_way(tmp_path) == {}


def test_a_process_that_had_no_room_to_count_may_have_had_something_under_way(tmp_path: Path) -> None:
    (tmp_path / "under-way-7").touch()
    assert told_under_way(tmp_path) == {7: 1}
