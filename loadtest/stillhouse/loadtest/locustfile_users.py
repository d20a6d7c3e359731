"""The same with a number of users that changes over time: the stages of a closed loop (`--stages FILE`)."""

from __future__ import annotations

from typing import ClassVar

from locust import LoadTestShape

from stillhouse.loadtest import hooks
from stillhouse.loadtest.arrivals import level_at
from stillhouse.loadtest.users import LlmUser

__all__ = ["LlmUser", "Stages"]


class Stages(LoadTestShape):  # type: ignore[misc]
    """So many users as the stage says, one at least; ends the test after the last."""

    use_common_options: ClassVar[bool] = True

    def tick(self) -> tuple[int, float] | None:
        shape = hooks.shape_in_users()
        level = None if shape is None else level_at(shape.stages, self.get_run_time())
        return None if level is None else (max(1, round(level)), 100.0)
