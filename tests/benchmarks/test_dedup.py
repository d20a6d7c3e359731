"""The deduplication benchmark: what it plants is what it says, and a small run finds it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def dedup(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("dedup")


@pytest.mark.parametrize("templated", [False, True], ids=["ordinary", "templated"])
def test_a_small_run_finds_what_is_planted_and_drops_nothing_else(
    templated: bool, dedup: ModuleType, tmp_path: Path
) -> None:
    maker = dedup.Maker(3, templated=templated)
    file = dedup._write(maker, 600, tmp_path)
    run = dedup.run_one(file, tmp_path)
    records = [json.loads(line) for at, line in enumerate(file.read_bytes().splitlines()) if at not in maker.bad]
    copies, leaks = (sum(key in record for record in records) for key in ("copy_of", "leak_of"))
    assert run["records"] == 600 == len(records) + len(maker.bad)
    assert sum(count for count, _ in run["duplicates"]["by_similarity"].values()) == copies
    assert 0 < run["duplicates"]["expected"] <= copies
    assert 0 < run["leaks"]["expected"] <= leaks
    assert run["bad"]["expected"] == len(maker.bad) > 0
    for kind in dedup.KINDS:
        assert min(run[kind]["recall"], run[kind]["precision"]) > 0.97


def test_the_made_records_are_the_same_for_a_seed(dedup: ModuleType) -> None:
    one, same, other = (list(dedup.Maker(seed, templated=False).lines(50)) for seed in (1, 1, 2))
    assert one == same != other
