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


def test_a_small_run_finds_the_planted_pairs_and_drops_nothing_else(dedup: ModuleType, tmp_path: Path) -> None:
    records = list(dedup.made_records(600, seed=3))
    (tmp_path / "made.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    run = dedup.run_one(tmp_path / "made.jsonl", tmp_path)
    copies = [record for record in records if "copy_of" in record]
    assert run["records"] == 600
    assert sum(count for count, _ in run["by_similarity"].values()) == len(copies)
    assert 0 < run["pairs"] < len(copies)
    assert run["recall"] > 0.97
    assert run["precision"] > 0.97


def test_the_made_records_are_the_same_for_a_seed(dedup: ModuleType) -> None:
    assert list(dedup.made_records(50, seed=1)) == list(dedup.made_records(50, seed=1))
    assert list(dedup.made_records(50, seed=1)) != list(dedup.made_records(50, seed=2))
