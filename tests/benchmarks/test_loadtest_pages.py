"""The benchmarks of the load test: their verdicts, and the tables that they write into the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import generators
import known_delays
import protocols
import under_200_ms

MACHINE = {"processor": "Some CPU", "cores": 2, "instruction_sets": ["avx2"]}
ABOUT = {"machine": MACHINE, "measured": "2026-11-26"}


@pytest.mark.parametrize(
    ("server_ms", "ours_ms", "right"), [(20, 21.9, True), (20, 22.1, False), (200, 203.9, True), (200, 195.9, False)]
)
def test_a_figure_is_right_within_two_milliseconds_or_two_per_cent(
    server_ms: float, ours_ms: float, right: bool
) -> None:
    assert known_delays.is_right({"server_ms": server_ms, "ours_ms": ours_ms}) is right


def test_what_is_off_by_too_much_says_so() -> None:
    found = {"ttft": {"server_ms": 200.0, "ours_ms": 201.0}, "itl": {"server_ms": 20.0, "ours_ms": 25.0}}
    found |= {"loop_cpu": 0.5, "tokens_per_s": 2000.0}
    table = known_delays.markdown({**ABOUT, "users": 50, "processes": 1, "seconds": 8, "protocols": {"grpc": found}})
    assert "| Triton, gRPC | 200.00 ms | 201.00 ms | +1.00 ms | 20.00 ms | 25.00 ms | +5.00 ms (too much) |" in table


def test_the_ratio_of_two_generators_is_the_median_of_the_rounds() -> None:
    rounds: dict[str, list[dict[str, float]]] = {
        name: [dict.fromkeys(generators.FIGURES, value) for value in values]
        for name, values in {"stillhouse": (100.0, 110.0, 300.0), "aiperf": (100.0, 100.0, 100.0)}.items()
    }
    report = {**ABOUT, "seconds": 15, "tokens": 32, "model": "m", "servers": {"known delays": rounds}}
    row = "| known delays | tokens/s | 110.0 (100.0–300.0) | 100.0 (100.0–100.0) | 1.10 |"
    assert row in generators.markdown(report)


def test_a_precision_that_never_holds_is_told() -> None:
    found: dict[str, Any] = {
        "prompt_tokens": 40.0,
        "answer_tokens": 14.0,
        "ttft_ms": [60.0, 90.0],
        "e2e_ms": [500, 900],
    }
    holds = {"capacity_per_s": 2.0, "goodput_per_s": 1.9, "tokens_per_s": 30.0, "e2e_there_ms": [700.0, 1200.0]}
    models = {"support-fp16": found | {"capacity_per_s": None}, "support-int4": found | holds}
    table = under_200_ms.markdown({**ABOUT, "models": models})
    assert "| fp16 | 60 / 90 | 500 / 900 | never | – |" in table
    assert "| int4 | 60 / 90 | 500 / 900 | 2.0 requests/s, 30 tokens/s | 700 / 1,200 |" in table


def test_the_questions_are_those_that_the_fine_tune_has_not_seen(tmp_path: Path) -> None:
    path = under_200_ms.write_prompts(tmp_path / "prompts.jsonl")
    asked = [json.loads(line)["messages"][0]["content"] for line in path.read_text("utf-8").splitlines()]
    trained = (under_200_ms.ROOT / "examples/support/records.jsonl").read_text("utf-8").splitlines()
    assert len(asked) > 20
    assert not set(asked) & {json.loads(line)["instruction"] for line in trained}


@pytest.mark.parametrize("module", [generators, known_delays, under_200_ms])
def test_each_has_its_place_in_the_page(module: Any) -> None:
    text = module.DOCS.read_text("utf-8")
    assert text.count(module.BEGIN) == text.count(module.END) == 1
    written = text.split(module.BEGIN)[1].split(module.END)[0]
    assert "\n|" in written or "not run yet: the command puts it here" in written


def test_protocols_agree_where_counts_are_one_and_ranges_meet() -> None:
    def runs(*throughputs: float, tokens: float = 32.0) -> list[dict[str, float]]:
        return [{"tokens_per_s": one, "tokens_per_answer": tokens} for one in throughputs]

    assert protocols.agree({"a": runs(10, 12), "b": runs(12, 14), "c": runs(11, 13)})
    assert not protocols.agree({"a": runs(10, 11), "b": runs(12, 14)})
    assert not protocols.agree({"a": runs(10, 12), "b": runs(11, 12, tokens=31.0)})
