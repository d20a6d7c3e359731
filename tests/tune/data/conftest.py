"""Small sources and recipes for `stillhouse data prepare`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.build.progress import LineReporter
from stillhouse.tune.data_recipe import load_data_recipe
from stillhouse.tune.prepare import Prepared, prepare

Run = Callable[..., Prepared]
Rows = list[dict[str, Any]]

_THINGS = [
    "lantern",
    "blanket",
    "kettle",
    "compass",
    "hammock",
    "rucksack",
    "thermos",
    "paddle",
    "tent",
    "stove",
    "helmet",
    "rope",
    "axe",
    "sled",
    "canoe",
    "bivouac",
    "whistle",
    "mirror",
    "saddle",
    "anchor",
    "lamp",
    "ladder",
    "shovel",
    "barrel",
    "bucket",
    "basket",
    "candle",
    "carpet",
    "curtain",
    "pillow",
]
_ACTS = (
    "How long does the {} last when it rains all week?",
    "Where was the {} made, and by whom?",
    "Can a child of seven carry the {} uphill alone?",
    "Which colour of {} sells best before Christmas?",
)
_ANSWERS = (
    "Nobody has worn out a {} of ours in less than nine seasons of daily use.",
    "A family workshop by the northern harbour sews every single {} by hand.",
    "With the short straps it can, since our {} weighs little more than a book.",
    "Moss green, by far: two of three customers choose their {} in that shade.",
)


def distinct(count: int) -> Rows:
    """Records that are alike in nothing that matters: another thing, another question, another answer each."""
    return [
        {
            "instruction": f"{_ACTS[at % 4].format(_THINGS[at % 30])} ({_words(f'{at}q')})",
            "input": "",
            "output": f"{_words(f'{at}a')} {_ANSWERS[at % 4].format(_THINGS[at % 30])} {_words(f'{at}b')}",
        }
        for at in range(count)
    ]


def _words(seed: str) -> str:
    """Four pronounceable words that are others for each seed."""
    dice = random.Random(seed)
    return " ".join("".join(dice.choice("bdfgklmnprst") + dice.choice("aeiou") for _ in range(4)) for _ in range(4))


def write_jsonl(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file


def read_jsonl(file: Path) -> Rows:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def all_records(done: Prepared) -> Rows:
    """The records of all splits."""
    return [record for name in done.card["splits"] for record in read_jsonl(done.path / f"{name}.jsonl")]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Prepares what a recipe says; without one, all records of data.jsonl in `tmp_path`. Pictures only if asked for."""

    def prepared(
        tables: str = '[[sources]]\npath = "data.jsonl"\n', *, force: bool = False, pictures: bool = False
    ) -> Prepared:
        recipe = tmp_path / "data.toml"
        recipe.write_text(f'name = "made"\n{tables}', "utf-8")
        with pytest.MonkeyPatch.context() as patch:
            if not pictures:  # a second for each dataset
                patch.setattr("stillhouse.tune.writing.draw_dataset", lambda *_: [])
            return prepare(load_data_recipe(recipe), tmp_path / "out", LineReporter(), force=force)

    return prepared


@pytest.fixture
def made() -> Callable[[int], Rows]:
    return distinct


@pytest.fixture
def tools() -> Any:
    """Reading and writing of JSONL, and all records of a dataset."""

    class Tools:
        write = staticmethod(write_jsonl)
        read = staticmethod(read_jsonl)
        records = staticmethod(all_records)

    return Tools
