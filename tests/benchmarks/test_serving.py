"""The benchmarks of the server read right what they saw: the soak's verdict, the ratios, the parts of a token's way."""

from __future__ import annotations

import asyncio
import copy
import random
import sys
from pathlib import Path
from typing import Any, cast

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import mixture
import serving_speed
import soak
import token_path

_MB = 1_000_000


def _rest() -> dict[str, Any]:
    process = {"rss_bytes": 200 * _MB, "pss_bytes": 200 * _MB, "anonymous_bytes": 150 * _MB}
    return {
        "at_s": 60,
        "processes": {
            "model": {"pid": 7, **process, "descriptors": 30, "threads": 9},
            "launcher": {"pid": 5, **process, "descriptors": 40, "threads": 12},
        },
        "num_requests_running": 0.0,
        "num_requests_waiting": 0.0,
        "kv_cache_usage_perc": 0.01,
        "shm": {"stillhouse_x_1": 4096},
        "answers": ["Send them back."] * 3,
    }


def _found(**last: Any) -> dict[str, Any]:
    return {"rests": [_rest(), _rest() | last], "samples": [], "counts": {}, "failures": []}


def test_what_is_as_it_was_has_lost_nothing() -> None:
    assert soak.verdict(_found()) == []


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ({"num_requests_running": 1.0}, "num_requests_running"),
        ({"kv_cache_usage_perc": 0.0101}, "kv_cache_usage_perc"),
        ({"shm": {}}, "shm"),
        ({"answers": ["Send them back.", "Send them back.", "Keep them."]}, "another answer"),
    ],
)
def test_what_has_not_come_back_is_named(last: dict[str, Any], words: str) -> None:
    (wrong,) = soak.verdict(_found(**last))
    assert words in wrong


@pytest.mark.parametrize(
    ("what", "value", "words"),
    [
        ("anonymous_bytes", 155 * _MB, ["memory grew by 5.0 MB"]),
        ("anonymous_bytes", 152 * _MB, []),
        ("pss_bytes", 400 * _MB, []),
        ("descriptors", 31, ["descriptors grew from 30 to 31"]),
        ("threads", 12, []),
        ("threads", 14, ["threads grew from 9 to 14"]),
        ("pid", 8, ["another process"]),
    ],
)
def test_a_process_that_holds_more_is_named(what: str, value: int, words: list[str]) -> None:
    found = _found()
    found["rests"][1]["processes"]["model"][what] = value
    assert [any(word in wrong for wrong in soak.verdict(found)) for word in words] == [True] * len(words)
    assert len(soak.verdict(found)) == len(words)


def test_a_known_question_without_an_answer_is_named() -> None:
    found = _found()
    for rest in found["rests"]:
        rest["answers"] = [""] * 3
    assert [wrong.split(",")[0] for wrong in soak.verdict(found)] == ["the known question has an empty answer"]


def test_a_failure_or_a_process_that_is_gone_is_named() -> None:
    found = copy.deepcopy(_found())
    found["failures"].append("grpc, short: StreamBroken: …")
    del found["rests"][1]["processes"]["model"]
    assert [wrong.split(":")[0] for wrong in soak.verdict(found)] == ["a request failed", "model"]


def test_the_requests_that_warm_the_server_up_come_before_its_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    async def period(_: Any, seen: mixture.Seen, seed: str, *__: Any) -> None:
        seeds.append(seed)
        seen.counts["grpc, short"] += 99
        seen.failures.append("one")

    monkeypatch.setattr(soak, "one_period", period)
    seen, nobody = mixture.Seen(), cast("Any", None)
    assert asyncio.run(soak.warm_up(nobody, seen, 7, 8)) == 0
    assert seeds == ["7/warm/0", "7/warm/1", "7/warm/2"]
    assert len(seen.failures) == 3


def test_one_rest_proves_nothing() -> None:
    found = _found()
    assert soak.verdict({**found, "rests": found["rests"][:1]})[0].startswith("too short")


def test_a_seed_is_the_same_mixture_of_all_kinds_and_doors() -> None:
    def errands(seed: str) -> list[mixture.Errand]:
        chance = random.Random(seed)
        return [mixture.errand(chance) for _ in range(300)]

    assert errands("a") == errands("a") != errands("b")
    assert {one.kind for one in errands("a")} == set(mixture.KINDS)
    assert {one.door for one in errands("a")} == set(mixture.DOORS)


def test_ratios_are_those_of_turns_that_followed_one_another() -> None:
    def turn(elapsed_s: float) -> dict[str, Any]:
        return {"elapsed_s": elapsed_s, "tokens": 100, "cpu_s": 0.1, "ttft_s": [], "server_cpu_s": {"triton": 0.2}}

    samples: dict[str, Any] = {
        "engine_16": [turn(1.0), turn(2.0), turn(4.0)],
        "triton_16": [turn(1.25), turn(2.5), turn(5.0)],
        "gateway_16": [turn(2.0), turn(4.0), turn(4.0)],
        **{
            f"{way}_ttft_s": [base + added, 2 * base + added]
            for way, base, added in (("engine", 0.1, 0.0), ("triton", 0.1, 0.004), ("gateway", 0.1, 0.006))
        },
    }
    of = serving_speed.figures(samples, [16])
    assert of["triton_16"]["ratio"] == pytest.approx(0.8)
    assert (of["gateway_16"]["ratio_low"], of["gateway_16"]["ratio_high"]) == (0.5, 1.0)
    assert of["triton_16"]["server_cpu_s_per_1000_tokens"]["triton"] == pytest.approx(2.0)
    assert of["gateway_ttft_s"]["added_median"] == pytest.approx(0.006)


def test_a_sample_counts_for_the_part_that_is_closest_to_the_running_line_and_the_rest_for_its_thread() -> None:
    loop = "thread (1): stillhouse-send;_loop (serve/stillhouse/serve/answering.py:40)"
    deliver = f"{loop};deliver (serve/stillhouse/serve/answering.py:96);_send (serve/stillhouse/serve/answering.py:140)"
    lines = [
        f"{deliver};answer_tensors (serve/stillhouse/serve/answers.py:28) 30",
        f"{deliver} 50",
        f"{loop} 20",
        "thread (2): stillhouse-engine;step (engine/core.py:160);choose (engine/sampler.py:50) 40",
    ]
    found = token_path.parts_of("model", token_path.Recording(lines, {1: 1.5, 2: 9.0, 3: 8.0}, seconds=10.0))
    assert found == pytest.approx(
        {
            "ONNX Runtime, the engine's thread": 8.8,
            "ONNX Runtime's other threads, and Triton's in this process": 8.0,
            "send(): Triton's part": 1.0,
            "send() and handing over between threads": 0.35,
            "sampling": 0.2,
            "building tensors": 0.15,
        }
    )
