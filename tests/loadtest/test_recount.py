"""The server's counts, checked with a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from stillhouse.loadtest.errors import BadInput
from stillhouse.loadtest.load import Load
from stillhouse.loadtest.recount import CountCheck, agrees, load_counter
from stillhouse.loadtest.report import token_table
from stillhouse.loadtest.run import run_locust


def save_tokenizer(path: Path, behaviour: str) -> Path:
    """One that makes a token of every word ("removed"), or of every word and every space ("isolated")."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behaviour)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(path))
    return path


def test_a_count_may_differ_by_the_end_token_and_by_how_words_are_cut() -> None:
    assert agrees(64, 64) and agrees(64, 63) and agrees(67, 64) and agrees(61, 64)
    assert not agrees(68, 64) and not agrees(60, 64)
    assert agrees(1020, 1000) and not agrees(1021, 1000), "2 % of a long answer"
    assert not agrees(10, 5), "a server that counts responses of two tokens each"


def test_checks_of_several_workers_add_up() -> None:
    whole, one, other = CountCheck(), CountCheck(), CountCheck()
    for part, counts in ((one, (64, 63)), (one, (20, 40)), (other, (50, 45))):
        part.add(*counts)
        whole.add(*counts)
    one.merge(CountCheck(**json.loads(json.dumps(other.to_json()))))
    assert one == whole
    assert str(whole).startswith("2 of 3 token counts disagree")
    assert "at most by -20, in all 134 against 148 (-9.5 %)" in str(whole)


def test_a_text_is_counted_as_a_whole_and_without_special_tokens(tmp_path: Path) -> None:
    count = load_counter(save_tokenizer(tmp_path / "tokenizer.json", "removed"))
    assert count is not None
    assert count("one two three four five six seven") == 7, "what the file says of cutting off is for training"
    assert count("") == 0
    assert load_counter(None) is None


def test_a_bad_tokenizer_gets_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read the tokenizer"):
        load_counter(tmp_path / "nowhere.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(BadInput, match="not one of the tokenizers library"):
        load_counter(tmp_path / "bad.json")


@pytest.mark.parametrize(("over", "behaviour", "disagree"), [("openai", "removed", False), ("grpc", "isolated", True)])
def test_a_run_says_how_many_counts_disagree(
    shared_server: Any, tmp_path: Path, over: str, behaviour: str, disagree: bool
) -> None:
    path = save_tokenizer(tmp_path / "tokenizer.json", behaviour)
    load = Load(users=4, duration_s=2, tokenizer=path)
    summary = run_locust(getattr(shared_server, f"{over}_host"), "support-int4", load).summary
    check = summary.count_check
    assert check is not None and check.answers == summary.requests > 0
    assert check.server_tokens == 11 * check.answers
    assert check.tokenizer_tokens == (22 if disagree else 11) * check.answers
    assert check.disagreeing == (check.answers if disagree else 0)
    assert f"{check.disagreeing} of {check.answers} token counts disagree" in token_table([summary])
