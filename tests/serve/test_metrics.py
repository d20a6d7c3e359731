"""What stands on Triton's metrics page, with the page made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from stillhouse.engine.answer import Chunk
from stillhouse.engine.core import Stats
from stillhouse.serve.metrics import Metrics

COUNTED = Stats(0, 0, 0, 100, 9, 7, requests_finished={"stop": 2})


def test_the_counters_leave_out_what_they_are_told_to() -> None:
    page: dict[str, float] = {}

    class Metric:
        def __init__(self, name: str, labels: dict[str, str]) -> None:
            self.name = f"{name} {labels.get('finished_reason', '')}".strip()

        def increment(self, value: float) -> None:
            page[self.name] = page.get(self.name, 0.0) + value

        def set(self, value: float) -> None:
            page[self.name] = value

    class Family:
        COUNTER, GAUGE, HISTOGRAM = range(3)

        def __init__(self, name: str, **_: Any) -> None:
            self.name = name

        def Metric(self, labels: dict[str, str], **_: Any) -> Metric:  # noqa: N802
            return Metric(self.name, labels)

    triton = SimpleNamespace(MetricFamily=Family, TritonModelException=RuntimeError)
    stats = [Stats(0, 0, 0, 100, 0, 0)]
    metrics = Metrics(triton, "m", "1", lambda: stats[-1])
    metrics.leave_out(Chunk("a", (5,), 4, 1))
    metrics.leave_out(Chunk("b", (6,), 4, 2, "stop"))
    stats.append(COUNTED)
    metrics.close()
    assert page["stillhouse_prompt_tokens_total"] == 9 - 4
    assert page["stillhouse_generation_tokens_total"] == 7 - 2
    assert page["stillhouse_request_success_total stop"] == 1
