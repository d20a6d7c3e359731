"""A number of users that changes over time: the stages of a closed loop (`--stages FILE`), as Locust's own shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from locust import LoadTestShape

from stillhouse.loadtest.arrivals import Stage, level_at

_SPAWNED_A_SECOND = 100.0


class UserStages(LoadTestShape):  # type: ignore[misc]
    """So many users as the stage says, one at least; ends the test after the last."""

    use_common_options: ClassVar[bool] = True

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__()
        self._stages = stages

    def tick(self) -> tuple[int, float] | None:
        level = level_at(self._stages, self.get_run_time())
        return None if level is None else (max(1, round(level)), _SPAWNED_A_SECOND)
