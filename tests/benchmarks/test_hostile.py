"""The generator of hostile requests repeats itself, and its judge lets nothing through that must not come back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import hostile
from attacks.attack import Attack, control
from attacks.generator import DOORS, Generator
from attacks.judge import judge
from attacks.wire import Reply

SOUND = {"choices": [{"text": " Paris", "finish_reason": "stop"}]}


def test_a_request_is_the_same_whichever_came_before_it() -> None:
    one, other = Generator(3, "m"), Generator(3, "m")
    one.attack(7)
    assert one.attack(40) == other.attack(40)
    assert len({other.attack(number).about for number in range(40, 60)}) == 20


def test_every_door_gets_every_kind_that_it_knows() -> None:
    seen = {(attack.door, attack.kind) for attack in map(Generator(0, "m").attack, range(700))}
    assert {door for door, _ in seen} == set(DOORS)
    assert len(seen) == 42
    assert {door for door, _ in {(a.door, a.kind) for a in map(Generator(0, "m", ("grpc",)).attack, range(9))}} == {
        "grpc"
    }


def completion(**changes: object) -> Attack:
    return Attack(path="/v1/completions", about="", door="gateway", kind="wrong types", **changes)  # type: ignore[arg-type]


def said(status: int, message: str) -> Reply:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return Reply(status, "application/json", json.dumps({"error": error}).encode())


def test_sound_answers_and_clear_errors_pass() -> None:
    assert judge(completion(), Reply(200, "application/json", json.dumps(SOUND).encode())) == ("answer", " Paris")
    events = f"data: {json.dumps(SOUND)}\n\ndata: [DONE]\n\n".encode()
    assert judge(completion(), Reply(200, "text/event-stream", events)) == ("answer", " Paris")
    assert judge(completion(), said(400, "n must be 1")).outcome == "refusal"
    assert judge(completion(pace="half"), Reply(fault="left")).outcome == "left"


@pytest.mark.parametrize(
    "reply",
    [
        Reply(fault="hang"),
        Reply(fault="closed (RemoteDisconnected)"),
        said(500, "n must be 1"),
        said(503, "later"),
        said(400, ""),
        said(400, "two\nlines"),
        said(400, "x" * 2000),
        said(400, "TypeError: 'NoneType' object is not subscriptable"),
        Reply(400, "application/json", b'{"detail": "no"}'),
        Reply(200, "application/json", b"{}"),
        Reply(200, "application/json", b"nonsense"),
        Reply(200, "application/json", b'{"choices": [{"text": "x", "finish_reason": "error"}]}'),
        Reply(200, "text/event-stream", f"data: {json.dumps(SOUND)}\n\n".encode()),
        Reply(200, "text/event-stream", b"data: [DONE]\n\n"),
    ],
)
def test_all_else_is_bad(reply: Reply) -> None:
    assert judge(completion(), reply).outcome == "bad"


def test_what_must_be_refused_must_not_be_answered_and_the_other_way_round() -> None:
    answer = Reply(200, "application/json", json.dumps(SOUND).encode())
    assert judge(completion(expected="refusal"), answer).outcome == "bad"
    assert judge(control("gateway", "m", "Hi"), said(400, "no")).outcome == "bad"


def test_the_table_has_a_row_for_each_kind_and_one_for_all() -> None:
    rows = [("a", "http", "answer", 2), ("a", "grpc", "bad", 1), ("b", "http", "refusal", 3)]
    report = {
        "outcomes": [dict(zip(("kind", "door", "outcome", "requests"), row, strict=True)) for row in rows],
        "before": {"tritonserver": {"rss_bytes": 10**8, "descriptors": 9}, "gone": {"rss_bytes": 1, "descriptors": 1}},
        "halfway": {"tritonserver": {"rss_bytes": 10**8, "descriptors": 9}},
        "after": {"tritonserver": {"rss_bytes": 11 * 10**7, "descriptors": 9}},
        "crashed": ["gone"],
        "grew": [],
        "control": {"asked": 3, "changed": []},
        "in_use_afterwards": dict.fromkeys(("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"), 0),
        "machine": {"processor": "p", "cores": 2},
        "requests": 6,
        "seed": 0,
        "seconds": 1.0,
        "slowest_s": 0.5,
        "measured": "today",
    }
    table = hostile.markdown(report)
    assert "| a | 2 | 0 | 0 | 1 |" in table
    assert "| **all** | 2 | 3 | 0 | 1 |" in table
    assert "| tritonserver | 100 | 100 | 110 | 9 | 9 | 9 |" in table
    assert "| gone | 0 | died | died | 1 | – | – |" in table


def test_a_process_that_grows_in_the_second_half_is_named_with_what_it_took() -> None:
    halfway = {name: {"rss_bytes": 10**8, "descriptors": 50} for name in ("flat", "fat", "leaky", "gone")}
    after = {
        "flat": {"rss_bytes": 124 * 10**6, "descriptors": 52},
        "fat": {"rss_bytes": 126 * 10**6, "descriptors": 50},
        "leaky": {"rss_bytes": 10**8, "descriptors": 53},
    }
    grew = hostile.grown(halfway, after)
    assert grew == ["fat: RSS (MB) grew from 100 to 126", "leaky: descriptors grew from 50 to 53"]
