"""How large an engine is made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

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
