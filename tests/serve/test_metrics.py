"""What stands on Triton's metrics page, with the page made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from stillhouse.engine.answer import Chunk
from stillhouse.engine.core import Stats
from stillhouse.engine.errors import InvalidRequest, PromptTooLong, QueueFull, StillhouseError
from stillhouse.serve.metrics import Metrics

COUNTED = Stats(0, 0, 0, 100, 9, 7, requests_finished={"stop": 2})


def made_up_triton(page: dict[str, float]) -> Any:
    """Triton's metrics, as far as a model sees them; what stands on the page goes into `page`."""

    class Metric:
        def __init__(self, name: str, labels: dict[str, str]) -> None:
            self.name = f"{name} {labels.get('finished_reason', '')}{labels.get('kind', '')}".strip()
            page[self.name] = 0.0

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

    return SimpleNamespace(MetricFamily=Family, TritonModelException=RuntimeError)


def test_the_counters_leave_out_what_they_are_told_to() -> None:
    page: dict[str, float] = {}
    stats = [Stats(0, 0, 0, 100, 0, 0)]
    metrics = Metrics(made_up_triton(page), "m", "1", lambda: stats[-1])
    metrics.leave_out(Chunk("a", (5,), 4, 1))
    metrics.leave_out(Chunk("b", (6,), 4, 2, "stop"))
    stats.append(COUNTED)
    metrics.close()
    assert page["stillhouse_prompt_tokens_total"] == 9 - 4
    assert page["stillhouse_generation_tokens_total"] == 7 - 2
    assert page["stillhouse_request_success_total stop"] == 1


def test_errors_are_counted_by_kind_and_each_kind_is_there_from_the_start() -> None:
    page: dict[str, float] = {}
    metrics = Metrics(made_up_triton(page), "m", "1", lambda: COUNTED)
    for error in (PromptTooLong("9 tokens"), InvalidRequest("n"), QueueFull("full"), StillhouseError("broken")):
        metrics.count_error(error)
    metrics.close()
    counted = {name.split()[1]: value for name, value in page.items() if "errors_total" in name}
    assert counted == {"invalid": 2, "queue_full": 1, "timeout": 0, "shut_down": 0, "internal": 1}
