"""The engine's laws, held against a runner whose every answer depends on the whole of its slot."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from counting_engine import (
    CONTEXT,
    EOS,
    Collected,
    CountingRunner,
    answer_alone,
    assert_nothing_is_held,
    forget_prefixes,
    make_engine,
    run_until_idle,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.engine.errors import QueueFull
from stillhouse.engine.request import Token
from stillhouse.engine.sampling import SamplingParams

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


def test_min_tokens_keeps_the_end_away_and_max_tokens_brings_it() -> None:
    engine, sink = make_engine(), Collected()
    engine.submit([9], SamplingParams(max_tokens=30, min_tokens=30, temperature=1.5, seed=1), sink)
    run_until_idle(engine)
    assert len(sink.ids) == 30
    assert EOS not in sink.ids[:-1]
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
    logits = CountingRunner(1).prefill(0, prompt, 0)[3].astype(float)
    expected = logits[40] - np.log(np.exp(logits).sum())
    assert whole[3].logprob == pytest.approx(expected, abs=1e-5)
    assert len(whole[3].top_logprobs) == 2
