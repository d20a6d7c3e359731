"""What goes wrong is named, and ends one request and no other."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
from counting_engine import GREEDY, Collected, answer_alone, assert_nothing_is_held, make_engine, run_until_idle

from stillhouse.engine.errors import DeadlineExceeded, EngineClosed, EngineError, PromptTooLong, QueueFull
from stillhouse.engine.request import Token
from stillhouse.engine.sampling import SamplingParams


def test_a_prompt_too_long_is_refused_with_both_numbers() -> None:
    with pytest.raises(PromptTooLong, match=r"64 tokens.*context holds 64"):
        make_engine().submit([1] * 64, GREEDY, Collected())


def test_beyond_the_queue_a_request_is_refused_at_once() -> None:
    engine = make_engine(1, max_waiting=2)
    for _ in range(3):
        engine.submit([1], GREEDY, Collected())
    with pytest.raises(QueueFull, match="3 requests are waiting, the queue holds 3 now"):
        engine.submit([1], GREEDY, Collected())
    run_until_idle(engine)
    engine.submit([1], GREEDY, Collected())


def test_logits_that_are_not_finite_end_their_own_request_alone() -> None:
    engine = make_engine()
    good, bad = Collected(), Collected()
    engine._runner.poisoned.add((7, 7, 7))  # type: ignore[attr-defined]
    engine.submit([7, 7, 7], GREEDY, bad)
    engine.submit([1, 2], GREEDY, good)
    run_until_idle(engine)
    assert bad.reason == "error"
    assert isinstance(bad.tokens[-1].error, EngineError)
    assert "NaN" in str(bad.tokens[-1].error)
    assert good.ids == answer_alone([1, 2], GREEDY)
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("odd", [{"temperature": 1e-46}, {"temperature": 1e-7, "top_p": 0.5}, {"prompt_logprobs": 20}])
def test_an_odd_parameter_harms_no_neighbour(odd: dict[str, Any]) -> None:
    engine, neighbour, strange = make_engine(), Collected(), Collected()
    engine.submit([1, 2], GREEDY, neighbour)
    engine.submit([3, 4], SamplingParams(max_tokens=5, **odd), strange)
    run_until_idle(engine)
    assert neighbour.ids == answer_alone([1, 2], GREEDY)
    assert strange.reason in ("stop", "length")


class Panic(BaseException):
    """What a library in Rust throws (pyo3's PanicException) is no Exception."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic])
def test_a_failing_loop_fails_what_runs_by_name_and_says_it_is_unhealthy(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    engine, done = make_engine(), threading.Event()
    tokens: list[Token] = []

    def sink(token: Token) -> None:
        tokens.append(token)
        if token.finish_reason:
            done.set()

    def broken(*_: object) -> None:
        raise kind("the device fell off")

    monkeypatch.setattr(engine._runner, "decode", broken)
    engine.start()
    engine.submit([1, 2], SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.0), sink)
    assert done.wait(10)
    assert tokens[-1].finish_reason == "error"
    assert "the device fell off" in str(tokens[-1].error)
    assert not engine.healthy
    with pytest.raises(EngineClosed, match="fell off"):
        engine.submit([1], GREEDY, Collected())


def test_a_reader_that_fails_loses_its_own_answer_and_nobody_elses() -> None:
    engine, other = make_engine(), Collected()

    def faulty(_: Token) -> None:
        raise RuntimeError("the reader is gone")

    params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.0)
    engine.submit([1, 2, 3], params, faulty)
    engine.submit([4, 5, 6], params, other)
    run_until_idle(engine)
    assert other.ids == answer_alone([4, 5, 6], params)
    assert engine.stats().running == 0


def test_a_reader_that_failed_once_hears_that_its_answer_has_ended() -> None:
    engine, heard = make_engine(), []

    def faulty(token: Token) -> None:
        heard.append(token)
        if len(heard) == 2:
            raise RuntimeError("half a character too many")

    engine.submit([1, 2, 3], SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.0), faulty)
    run_until_idle(engine)
    assert [token.finish_reason for token in heard] == [None, None, "error"]
    assert "half a character too many" in str(heard[-1].error)
    assert engine.stats().requests_finished == {"error": 1}


def test_a_request_out_of_time_ends_with_a_named_error_waiting_or_running() -> None:
    engine, running, waiting = make_engine(1), Collected(), Collected()
    endless = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)
    engine.submit([1, 2], endless, running, timeout_s=0.05)
    engine.submit([1, 2], endless, waiting, timeout_s=0.0)
    engine.step()
    time.sleep(0.06)
    run_until_idle(engine)
    for sink in (running, waiting):
        assert sink.reason == "error"
        assert isinstance(sink.tokens[-1].error, DeadlineExceeded)
    assert running.ids
    assert_nothing_is_held(engine)


def test_in_a_forked_process_a_request_is_refused_and_not_left_waiting() -> None:
    engine = make_engine()
    engine.start()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            engine.submit([1], GREEDY, Collected())
        except EngineClosed as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    assert b"not in this process" in os.read(read, 1000)
    os.close(read)
    os.waitpid(child, 0)
    engine.close()


def test_closing_ends_what_runs_and_refuses_what_comes() -> None:
    engine, ended = make_engine(), threading.Event()
    engine.start()
    engine.submit(
        [1, 2],
        SamplingParams(max_tokens=10**6, ignore_eos=True, temperature=0.0),
        lambda token: ended.set() if token.finish_reason else None,
    )
    engine.close()
    assert ended.wait(5)
    with pytest.raises(EngineClosed):
        engine.submit([1], GREEDY, Collected())
