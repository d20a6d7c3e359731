"""Pages of a mapped file that are given back: they leave the process's memory, and nothing is lost."""

from __future__ import annotations

import mmap
import os
import re
import threading
from pathlib import Path

import pytest

from stillhouse.engine.resident import paged_out, released_after

CONTENT = b"weights " * 2**20


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "model.onnx.data"
    with file.open("wb") as stream:
        stream.write(CONTENT)
        os.fsync(stream.fileno())  # a page that is still to be written cannot go
    return file


def mapping_of(file: Path) -> mmap.mmap:
    """The file as ONNX Runtime maps it: what is written goes to a page of its own."""
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


def resident_bytes(file: Path) -> int:
    smaps = Path("/proc/self/smaps").read_text("utf-8")
    found = re.findall(rf"{re.escape(str(file.resolve()))}\n(?:.*\n){{1,5}}?Rss: +(\d+) kB", smaps)
    return 1024 * sum(map(int, found))


def test_pages_that_were_read_go_and_come_back_as_they_were(weights: Path) -> None:
    with released_after(weights):
        mapped = mapping_of(weights)
        assert mapped[:] == CONTENT
        assert resident_bytes(weights) == len(CONTENT)
    assert resident_bytes(weights) == 0
    assert mapped[:] == CONTENT


def test_what_was_written_to_a_mapping_stays(weights: Path) -> None:
    with released_after(weights):
        mapped = mapping_of(weights)
        mapped[5000:5003] = b"own"
    assert mapped[5000:5003] == b"own"
    assert weights.read_bytes() == CONTENT


def test_mappings_from_before_and_of_other_files_are_left_alone(weights: Path) -> None:
    before = mapping_of(weights)
    assert before[:] == CONTENT
    with released_after(weights):
        pass
    with released_after(weights.with_name("another")):
        pass
    assert resident_bytes(weights) == len(CONTENT)


def test_pages_go_while_the_file_is_read_and_the_watcher_ends(weights: Path) -> None:
    mapped, gone = mapping_of(weights), False
    with paged_out(weights, every_s=0.01):
        assert mapped[:] == CONTENT
        gone = any(resident_bytes(weights) < len(CONTENT) / 4 for _ in range(1000))
    assert gone
    assert mapped[:] == CONTENT
    assert "stillhouse-page-out" not in {thread.name for thread in threading.enumerate()}
