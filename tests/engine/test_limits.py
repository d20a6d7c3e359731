"""How large an engine is made."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.engine.errors import UsageError
from stillhouse.engine.limits import limits_of
from stillhouse.engine.options import EngineOptions

MANIFEST: Any = SimpleNamespace(
    model="m-int4",
    network=SimpleNamespace(context_length=4096),
    memory=SimpleNamespace(kv_bytes_per_token=1000),
)


@pytest.mark.parametrize(("slots", "asked", "held"), [(32, None, 32), (1, None, 4), (8, 0, 0), (8, 1000, 1000)])
def test_the_queue_is_as_long_as_there_are_slots_unless_it_is_said(slots: int, asked: int | None, held: int) -> None:
    assert limits_of(MANIFEST, EngineOptions(max_num_seqs=slots, max_waiting=asked)).max_waiting == held


@pytest.mark.parametrize(
    ("budget_tokens", "slots", "prefixes"),
    [(36_000, 32, 4), (35_000, 32, 3), (32_000, 32, 0), (5_999, 5, 0), (1000, 1, 0)],
)
def test_a_cache_that_is_allocated_whole_has_as_many_slots_as_its_budget_holds(
    budget_tokens: int, slots: int, prefixes: int, caplog: pytest.LogCaptureFixture
) -> None:
    options = EngineOptions(max_model_len=1000, kv_cache_bytes=1000 * budget_tokens)
    with caplog.at_level(logging.WARNING):
        limits = limits_of(MANIFEST, options, allocated_whole=True)
    assert (limits.slots, limits.prefix_slots) == (slots, prefixes)
    assert limits.kv_capacity_tokens == (slots + prefixes) * 1000 <= budget_tokens
    assert limits.max_waiting == max(slots, 4)
    said = [record.getMessage() for record in caplog.records]
    assert said == [] if slots + prefixes == 36 else f"max_num_seqs is {slots} instead of 32" in said[0]
    paged = limits_of(MANIFEST, options)
    assert (paged.slots, paged.prefix_slots) == (32, 4)


def test_a_budget_that_does_not_hold_one_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match=r"999000 bytes holds 999 tokens, but max_model_len is 1000"):
        limits_of(MANIFEST, EngineOptions(max_model_len=1000, kv_cache_bytes=999_000), allocated_whole=True)
