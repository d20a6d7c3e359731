"""When a model whose process has died is repaired."""

from __future__ import annotations

from stillhouse.serve.supervisor import Backoff


def test_the_first_repair_is_at_once_and_those_that_follow_closely_wait_longer_and_longer() -> None:
    now_s = [1000.0]
    backoff = Backoff(lambda: now_s[0])
    waits = []
    for _ in range(8):
        waits.append(backoff.next_s())
        now_s[0] += waits[-1] + 3.0  # the repair, and a moment of life
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30]
    now_s[0] += 300.0
    assert [backoff.next_s(), backoff.next_s()] == [0, 1]
