"""Who is served when, and what becomes of whom where memory runs out."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from counting_engine import (
    CONTEXT,
    GREEDY,
    Collected,
    CountingRunner,
    answer_alone,
    assert_nothing_is_held,
    make_engine,
    run_until_idle,
)
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.engine.errors import InvalidRequest, QueueFull
from stillhouse.engine.model import LanguageModel
from stillhouse.engine.request import Request, Token
from stillhouse.engine.sampling import SamplingParams
from stillhouse.engine.scheduler import Limits, Scheduler, chunk_size


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
    scheduler = Scheduler(CountingRunner(1), Limits(1, CONTEXT, CONTEXT))
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


def test_where_the_cache_holds_less_than_the_slots_who_is_let_in_waits_no_longer_than_with_all_of_them() -> None:
    def longest_wait(prompt_tokens: int, capacity: int) -> int:
        """In steps, under constant offers of more than is let in, once the first of those have ended."""
        engine, requests = make_engine(32, chunk=CONTEXT, capacity=capacity, max_waiting=32), list[Request]()
        params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        came, waited = dict[str, int](), dict[str, int]()
        for step in range(300):
            with contextlib.suppress(QueueFull):
                while True:
                    requests.append(engine.submit([1] * prompt_tokens, params, Collected()))
                    came[requests[-1].id] = step
            engine.step()
            for request in requests:
                if request.output_ids:
                    waited.setdefault(request.id, step - came[request.id])
        return max(wait for request, wait in waited.items() if came[request] > 100)

    full = longest_wait(40, 32 * CONTEXT)
    assert longest_wait(40, 4 * CONTEXT) <= 2 * full
    assert longest_wait(8, 4 * CONTEXT) <= 2 * full


@pytest.mark.parametrize(("prompt_tokens", "let_in"), [(2, 64), (40, 2 * 7)])
def test_a_burst_onto_an_idle_engine_is_refused_only_where_the_cache_does_not_hold_it(
    prompt_tokens: int, let_in: int
) -> None:
    engine = make_engine(32, capacity=5 * CONTEXT + 40, max_waiting=32)
    for _ in range(let_in):
        engine.submit([1] * prompt_tokens, GREEDY, Collected())
    with pytest.raises(QueueFull, match=f"the queue holds {let_in} now"):
        engine.submit([1] * prompt_tokens, GREEDY, Collected())
    run_until_idle(engine)
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("prompt_tokens", [1, 2, 9, 31, 40, 63])
@pytest.mark.parametrize(("slots", "capacity", "max_waiting"), [(32, 360, 32), (4, 64, 0), (2, 640, 9), (8, 80, 3)])
def test_how_many_alike_an_idle_engine_takes_in_is_known_before(
    prompt_tokens: int, slots: int, capacity: int, max_waiting: int
) -> None:
    engine = make_engine(slots, capacity=capacity, max_waiting=max_waiting)
    for _ in range(engine.limits.most_alike(prompt_tokens)):
        engine.submit([1] * prompt_tokens, GREEDY, Collected())
    with pytest.raises(QueueFull):
        engine.submit([1] * prompt_tokens, GREEDY, Collected())
    run_until_idle(engine)


def test_answers_that_can_never_be_taken_in_together_are_invalid_and_no_full_queue() -> None:
    limits = Limits(slots=32, max_model_len=4096, kv_capacity_tokens=4096, max_waiting=32)
    model: Any = SimpleNamespace(engine=SimpleNamespace(limits=limits))
    with pytest.raises(InvalidRequest, match=r"n: 7 answers to a prompt of 2000 tokens are more than .* together, 6"):
        LanguageModel.submit(model, [1] * 2000, SamplingParams(n=7), print)
