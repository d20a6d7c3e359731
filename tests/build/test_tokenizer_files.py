"""A tokenizer's own settings for training do not reach the build, and its chat template is never lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.build.plan import plan
from stillhouse.build.recipe import load_recipe
from stillhouse.build.texts import evaluation_text, token_ids
from stillhouse.build.tokenizer_files import write_tokenizer
from stillhouse.engine.errors import StillhouseError

TRUNCATION = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 600_000}, "direction": "Right", "pad_to_multiple_of": None,
    "pad_id": 2, "pad_type_id": 0, "pad_token": "<|im_end|>",
}  # fmt: skip
DEFAULT = {"name": "default", "template": "{{ messages[0].content }}\r\n"}
TOOLS = {"name": "tool_use", "template": "{{ tools }}"}
RAG = {"name": "rag", "template": "{{ documents }}"}


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def set_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("settings", [{"truncation": TRUNCATION}, {"padding": PADDING}])
def test_a_text_is_measured_whole_whatever_the_tokenizer_was_saved_with(
    settings: dict[str, object], base: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    text = evaluation_text(None)
    whole, key = token_ids(text, base / "tokenizer.json"), plan(load_recipe(write_recipe(base=base)), tmp_path)
    set_json(base / "tokenizer.json", **settings)
    assert token_ids(text, base / "tokenizer.json") == whole
    changed = plan(load_recipe(write_recipe(base=base)), tmp_path)
    assert changed.reference_key != key.reference_key


def with_templates(base: Path, *templates: object) -> Path:
    (base / "chat_template.jinja").unlink()
    set_json(base / "tokenizer_config.json", chat_template=list(templates))
    return base


@pytest.mark.parametrize(("templates", "kept"), [([TOOLS, DEFAULT], DEFAULT), ([RAG], RAG)])
def test_of_chat_templates_with_names_the_default_is_kept_or_the_only_one(
    templates: list[dict[str, str]], kept: dict[str, str], base: Path, tmp_path: Path
) -> None:
    (tmp_path / "merged").mkdir()
    write_tokenizer(with_templates(base, *templates), [], tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_bytes().decode() == kept["template"]


@pytest.mark.parametrize(
    ("templates", "words"),
    [([TOOLS, RAG], "has the chat templates tool_use, rag, none of them is the default"), ([1], "no list of named")],
)
def test_chat_templates_of_which_none_is_the_default_are_refused_before_anything_is_run(
    templates: list[object], words: str, base: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    with_templates(base, *templates)
    with pytest.raises(StillhouseError, match=words):
        plan(load_recipe(write_recipe(base=base)), tmp_path / "repository")
