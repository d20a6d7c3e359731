"""The engine's laws, held against a runner whose every answer depends on the whole of its slot."""

from __future__ import annotations

import importlib.util
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.engine.core import Engine
from stillhouse.engine.errors import DeadlineExceeded, EngineClosed, EngineError, PromptTooLong, QueueFull
from stillhouse.engine.request import Request, Token
from stillhouse.engine.sampling import SamplingParams
from stillhouse.engine.scheduler import Limits, Scheduler, chunk_size
from stillhouse.engine.thinking import Thinking, ThinkingTags

_spec = importlib.util.spec_from_file_location("counting_runner", Path(__file__).with_name("counting_runner.py"))
assert _spec
assert _spec.loader
counting_runner = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(counting_runner)

CONTEXT = 64
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


def make_engine(
    slots: int = 4, *, chunk: int = 8, capacity: int | None = None, prefix_slots: int = 0, **limits: Any
) -> Engine:
    runner = counting_runner.CountingRunner(slots + prefix_slots)
    sizes = Limits(
        slots,
        CONTEXT,
        capacity or (slots + prefix_slots) * CONTEXT,
        prefill_chunk_tokens=chunk,
        prefill_alone_tokens=chunk,
        prefix_slots=prefix_slots,
        **limits,
    )
    return Engine(runner, sizes, [counting_runner.EOS])


class Collected:
    """A sink that keeps what it got."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.tokens: list[Token] = []
        self._stop_after = stop_after
        self.stopped = False

    def __call__(self, token: Token) -> bool:
        assert not (self.reason or self.stopped), "a token came after the last"
        self.tokens.append(token)
        self.stopped = self._stop_after is not None and len(self.ids) >= self._stop_after
        return self.stopped

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens if token.token_id is not None]

    @property
    def reason(self) -> str | None:
        return self.tokens[-1].finish_reason if self.tokens else None


def run_until_idle(engine: Engine, most_steps: int = 10_000) -> None:
    for _ in range(most_steps):
        if not engine.stats().running and not engine.stats().waiting:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def answer_alone(prompt: Sequence[int], params: SamplingParams) -> list[int]:
    engine, sink = make_engine(1, chunk=1000), Collected()
    engine.submit(prompt, params, sink)
    run_until_idle(engine)
    return sink.ids


def assert_nothing_is_held(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
    assert engine._runner.slots == [None] * len(engine._runner.slots)  # type: ignore[attr-defined]


def forget_prefixes(engine: Engine) -> None:
    while engine._scheduler._forget_one_prefix():
        pass


prompts = st.lists(st.integers(0, 63), min_size=1, max_size=40)
requests = st.tuples(
    prompts,
    st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 20),
        temperature=st.sampled_from([0.0, 0.7, 1.5]),
        top_k=st.sampled_from([0, 5]),
        top_p=st.sampled_from([1.0, 0.9]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.integers(0, 2**32),
    ),
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=9),
    st.integers(2, 5),
    st.integers(3, 16),
    st.integers(CONTEXT, 3 * CONTEXT),
    st.integers(0, 2),
    st.randoms(),
)
def test_batching_chunking_preemption_and_prefix_reuse_change_no_answer(
    asked: list[tuple[list[int], SamplingParams]],
    slots: int,
    chunk: int,
    capacity: int,
    prefix_slots: int,
    dice: random.Random,
) -> None:
    """Greedy or seeded, joined at any step, in any company, in little memory: the answer is the one given alone."""
    engine = make_engine(slots, chunk=chunk, capacity=capacity, prefix_slots=prefix_slots)
    sinks = []
    for prompt, params in asked:
        sinks.append(Collected())
        engine.submit(prompt, params, sinks[-1])
        for _ in range(dice.randrange(4)):
            engine.step()
    run_until_idle(engine)
    for (prompt, params), sink in zip(asked, sinks, strict=True):
        assert sink.ids == answer_alone(prompt, params)
    forget_prefixes(engine)
    assert_nothing_is_held(engine)


@settings(max_examples=40, deadline=None)
@given(st.lists(requests, min_size=2, max_size=8), st.randoms())
def test_a_cancel_at_any_moment_changes_nobody_else(
    asked: list[tuple[list[int], SamplingParams]], dice: random.Random
) -> None:
    engine = make_engine(3)
    sinks = [Collected() for _ in asked]
    handles = [engine.submit(prompt, params, sink) for (prompt, params), sink in zip(asked, sinks, strict=True)]
    victim = dice.randrange(len(asked))
    for _ in range(dice.randrange(12)):
        engine.step()
    handles[victim].cancel()
    run_until_idle(engine)
    for index, ((prompt, params), sink) in enumerate(zip(asked, sinks, strict=True)):
        whole = answer_alone(prompt, params)
        if index != victim:
            assert sink.ids == whole
        else:
            assert sink.ids == whole[: len(sink.ids)]
            assert sink.reason in ("cancelled", "stop", "length")
    assert_nothing_is_held(engine)


def test_nothing_is_lost_over_ten_thousand_random_events() -> None:
    dice = random.Random(7)
    engine = make_engine(4, capacity=150, max_waiting=6, prefix_slots=2)
    beginnings = [[dice.randrange(64) for _ in range(40)] for _ in range(3)]
    sinks: list[Collected] = []
    handles: list[Any] = []
    for _ in range(10_000):
        event = dice.random()
        if event < 0.25:
            sink = Collected(stop_after=dice.choice([None, None, 3]))
            prompt = [dice.randrange(64) for _ in range(dice.randrange(1, 50))]
            if dice.random() < 0.3:
                prompt = dice.choice(beginnings)[: dice.randrange(17, 41)] + prompt[:10]
            try:
                params = SamplingParams(
                    max_tokens=dice.randrange(1, 40), temperature=0.0, ignore_eos=dice.random() < 0.5
                )
                handles.append(engine.submit(prompt, params, sink))
                sinks.append(sink)
            except QueueFull:
                pass
        elif event < 0.32 and handles:
            dice.choice(handles[-10:]).cancel()
        else:
            engine.step()
        stats = engine.stats()
        assert stats.kv_tokens_used <= 150
    run_until_idle(engine)
    assert engine.stats().preemptions_total > 0
    assert engine.stats().prefix_tokens_total > 0
    forget_prefixes(engine)
    assert_nothing_is_held(engine)
    assert all(sink.reason or sink.stopped for sink in sinks)
    stats = engine.stats()
    assert sum(len(sink.ids) for sink in sinks) == stats.generation_tokens_total
    assert sum(stats.requests_finished.values()) == len(sinks)


@given(st.integers(1, 200), st.integers(3, 50))
def test_a_prefill_never_ends_in_a_chunk_of_one_token(prompt_tokens: int, chunk: int) -> None:
    """One token is another kernel than several, unless the prompt has but one."""
    remaining = prompt_tokens
    while remaining:
        size = chunk_size(remaining, chunk)
        assert size >= min(2, prompt_tokens)
        remaining -= size


def test_a_request_joins_while_others_decode() -> None:
    engine = make_engine(2)
    first, second = Collected(), Collected()
    engine.submit([1, 2, 3], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True), first)
    for _ in range(5):
        engine.step()
    engine.submit([4, 5, 6], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True), second)
    run_until_idle(engine)
    assert 2 in engine._runner.decode_rows  # type: ignore[attr-defined]
    assert [len(first.ids), len(second.ids)] == [20, 4]


def test_running_requests_get_a_token_at_every_chunk_of_a_long_prompt() -> None:
    engine = make_engine(2, chunk=4)
    running = Collected()
    engine.submit([1, 2, 3], SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True), running)
    engine.step()
    engine.submit(list(range(40)), GREEDY, Collected())
    before = len(running.ids)
    for _ in range(8):
        engine.step()
    assert len(running.ids) == before + 8


def test_the_first_come_is_the_first_served() -> None:
    engine = make_engine(1)
    order: list[int] = []
    for index in range(5):
        engine.submit([index + 1], SamplingParams(max_tokens=1, temperature=0.0), lambda _, i=index: order.append(i))
    run_until_idle(engine)
    assert order == [0, 1, 2, 3, 4]


def test_min_tokens_keeps_the_end_away_and_max_tokens_brings_it() -> None:
    engine, sink = make_engine(), Collected()
    engine.submit([9], SamplingParams(max_tokens=30, min_tokens=30, temperature=1.5, seed=1), sink)
    run_until_idle(engine)
    assert len(sink.ids) == 30
    assert counting_runner.EOS not in sink.ids[:-1]
    assert sink.reason == "length"


def test_an_answer_ends_where_the_context_does() -> None:
    engine, sink = make_engine(), Collected()
    engine.submit([3] * 60, SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True), sink)
    run_until_idle(engine)
    assert len(sink.ids) == CONTEXT - 60
    assert sink.reason == "length"


def test_a_stop_token_ends_the_answer() -> None:
    whole = answer_alone([5, 6], SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))
    engine, sink = make_engine(), Collected()
    stop = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=(whole[4],))
    engine.submit([5, 6], stop, sink)
    run_until_idle(engine)
    assert sink.ids == whole[: whole.index(whole[4]) + 1]
    assert sink.reason == "stop"


def test_a_prompt_too_long_is_refused_with_both_numbers() -> None:
    with pytest.raises(PromptTooLong, match=r"64 tokens.*context holds 64"):
        make_engine().submit([1] * 64, GREEDY, Collected())


def test_beyond_the_queue_a_request_is_refused_at_once() -> None:
    engine = make_engine(1, max_waiting=2)
    for _ in range(3):
        engine.submit([1], GREEDY, Collected())
    with pytest.raises(QueueFull, match="holds 2"):
        engine.submit([1], GREEDY, Collected())
    run_until_idle(engine)
    engine.submit([1], GREEDY, Collected())


def test_of_those_who_wait_the_lower_priority_comes_first_and_among_equals_the_older() -> None:
    engine, order = make_engine(1), list[str]()

    def submit(name: str, priority: int) -> None:
        def sink(token: Token) -> None:
            if token.finish_reason:
                order.append(name)

        engine.submit([1, 2], replace(GREEDY, priority=priority), sink)

    submit("running", 5)
    engine.step()
    for name, priority in (("late", 1), ("first", 0), ("urgent", -1), ("second", 0)):
        submit(name, priority)
    run_until_idle(engine)
    assert order == ["running", "urgent", "first", "second", "late"]


def test_a_prompt_that_made_room_waits_at_its_place_again() -> None:
    """Of two that are cut off while they prefill, the urgent one comes first, whenever it was submitted."""
    scheduler = Scheduler(counting_runner.CountingRunner(1), Limits(1, CONTEXT, CONTEXT))
    requests = {
        name: Request(name, [1] * 8, replace(GREEDY, priority=priority), Collected())
        for name, priority in (("old", 1), ("urgent", 0), ("new", 1))
    }
    for name in ("new", "old"):
        scheduler.wait(requests[name])
    assert scheduler.next_to_prefill(0) is requests["old"]
    scheduler.wait(requests["urgent"])
    scheduler._limits = Limits(1, CONTEXT, 0)
    scheduler.make_room()
    assert [request.id for request in scheduler.waiting] == ["urgent", "old", "new"]


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


def test_a_preempted_prefill_counts_and_scores_its_prompt_once() -> None:
    engine = make_engine(3, capacity=CONTEXT + 10, chunk=4)
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    prompts = [[1] * 20, [2] * 20, [3] * 22]
    tokens: list[Token] = []
    for prompt in prompts[:2]:
        engine.submit(prompt, params, Collected())
    scored = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    for _ in range(12):
        engine.step()
    engine.submit(prompts[2], scored, tokens.append)
    run_until_idle(engine)
    assert tokens[0].prompt_logprobs is not None
    assert len(tokens[0].prompt_logprobs) == 21
    assert engine.stats().prompt_tokens_total == 62


def test_a_failing_loop_fails_what_runs_by_name_and_says_it_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, done = make_engine(), threading.Event()
    tokens: list[Token] = []

    def sink(token: Token) -> None:
        tokens.append(token)
        if token.finish_reason:
            done.set()

    def broken(*_: object) -> None:
        raise RuntimeError("the device fell off")

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


def test_when_memory_runs_out_the_youngest_is_preempted_and_its_answer_stays_the_same() -> None:
    engine = make_engine(4, capacity=CONTEXT + 10)
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    sinks = [Collected() for _ in range(4)]
    for index, sink in enumerate(sinks):
        engine.submit([index + 1] * 5, params, sink)
    run_until_idle(engine)
    assert engine._runner.swaps > 0  # type: ignore[attr-defined]
    assert [sink.ids for sink in sinks] == [answer_alone([index + 1] * 5, params) for index in range(4)]
    assert_nothing_is_held(engine)


def test_kept_prompts_give_way_to_who_was_preempted() -> None:
    """A request that ends keeps its prompt for reuse; it must not keep a preempted one out."""
    engine = make_engine(2, capacity=CONTEXT + 40, prefix_slots=2)
    sinks = [Collected() for _ in range(3)]
    for index, (sink, tokens) in enumerate(zip(sinks, (20, 12, 25), strict=True)):
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        engine.submit([index + 1] * 38, params, sink)
    run_until_idle(engine, most_steps=500)
    assert [len(sink.ids) for sink in sinks] == [20, 12, 25]


def test_a_shared_beginning_is_prefilled_once() -> None:
    engine = make_engine(2, prefix_slots=1, chunk=100)
    system = list(range(1, 41))
    for question in ([50, 51, 52], [53, 54], [55]):
        sink = Collected()
        engine.submit(system + question, GREEDY, sink)
        run_until_idle(engine)
        assert sink.ids == answer_alone(system + question, GREEDY)
    # The third has one token of its own; two are left to prefill, since one alone is another kernel.
    assert engine._runner.prefill_sizes == [43, 2, 2]  # type: ignore[attr-defined]
    assert engine.stats().prefix_tokens_total == 40 + 39


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


@pytest.mark.parametrize("opened_by_prompt", [True, False])
def test_a_thinking_budget_forces_the_end_tag_and_counts_the_thoughts(opened_by_prompt: bool) -> None:
    start, end = 60, 61
    prompt = [1, 2, start] if opened_by_prompt else [1, 2]
    thinking = Thinking(ThinkingTags((start,), (end, 62)), prompt, budget_tokens=4)
    bias = {} if opened_by_prompt else {start: 100.0}
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logit_bias={end: -100.0, **bias})
    engine, sink = make_engine(), Collected()
    engine.submit(prompt, params, sink, thinking=thinking)
    run_until_idle(engine)
    begins = 0 if opened_by_prompt else 1
    assert sink.ids[begins + 4 : begins + 6] == [end, 62]
    assert thinking.tokens == (4 if opened_by_prompt else thinking.tokens)
    assert len(sink.ids) == 12


def test_the_log_probabilities_of_a_prompt_are_those_of_its_tokens() -> None:
    prompt = [5, 9, 13, 2, 40, 41, 42, 43, 44, 45, 46]
    tokens: dict[int, list[Token]] = {}
    for chunk in (100, 4):
        tokens[chunk] = []
        engine = make_engine(1, chunk=chunk)
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2)
        engine.submit(prompt, params, tokens[chunk].append)
        run_until_idle(engine)
    whole, chunked = tokens[100][0].prompt_logprobs, tokens[4][0].prompt_logprobs
    assert whole == chunked
    assert whole is not None
    assert [entry.token_id for entry in whole] == prompt[1:]
    logits = counting_runner.CountingRunner(1).prefill(0, prompt, 0)[3].astype(float)
    expected = logits[40] - np.log(np.exp(logits).sum())
    assert whole[3].logprob == pytest.approx(expected, abs=1e-5)
    assert len(whole[3].top_logprobs) == 2
