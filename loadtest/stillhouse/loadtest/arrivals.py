"""When requests are to be sent in an open loop: a plan that does not wait for the server.

Times are seconds from the test's start. Several dispatchers share one plan: `share` of `shares` takes its part, so that
all together are the whole rate. A rate may change over time (stages); arrivals then follow its integral.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, islice
from typing import TypeVar

from stillhouse.loadtest.errors import BadInput

_T = TypeVar("_T")
POISSON, CONSTANT = "poisson", "constant"
KINDS = (POISSON, CONSTANT)


@dataclass(frozen=True)
class Stage:
    """For `duration_s` the level goes from `begin` to `end` in a line; a level is requests a second, or users."""

    duration_s: float
    begin: float
    end: float

    @property
    def area(self) -> float:
        return self.duration_s * (self.begin + self.end) / 2


def plan(
    stages: Sequence[Stage], kind: str, seed: int, *, share: int = 0, shares: int = 1, for_ever: bool = False
) -> Iterator[float]:
    """The times of this share's requests, in order. `for_ever` goes on at the last level after the stages' end.

    A Poisson process's shares are Poisson processes of a part of its rate each (superposition); a constant rate's
    take turns.
    """
    if kind not in KINDS:
        raise BadInput(f"arrivals are {' or '.join(KINDS)}, got {kind!r}")
    units: Iterator[float]
    if kind == POISSON:
        chance = random.Random(f"{seed}/{share}")
        units = accumulate(chance.expovariate(1.0) * shares for _ in count())
    else:
        units = (float(number) for number in count(share, shares))
    return _times(units, stages, for_ever=for_ever)


def turns(trace: Sequence[_T], share: int, shares: int) -> list[_T]:
    """This share of a recorded trace: of its times, or of its prompts."""
    return list(islice(trace, share, None, shares))


def level_at(stages: Sequence[Stage], time_s: float) -> float | None:
    """The level at a time; None after the end."""
    for stage in stages:
        if time_s < stage.duration_s:
            return stage.begin + (stage.end - stage.begin) * time_s / stage.duration_s
        time_s -= stage.duration_s
    return None


def _times(units: Iterator[float], stages: Sequence[Stage], *, for_ever: bool) -> Iterator[float]:
    """Where the rate's integral reaches each of `units`: inversion, as for any inhomogeneous Poisson process."""
    stage_list = list(stages)
    if for_ever and stage_list and stage_list[-1].end > 0:
        stage_list.append(Stage(math.inf, stage_list[-1].end, stage_list[-1].end))
    begun_s, done = 0.0, 0.0
    unit = next(units)
    for stage in stage_list:
        area = math.inf if math.isinf(stage.duration_s) else stage.area
        while unit - done < area:
            yield begun_s + _inverse(stage, unit - done)
            unit = next(units)
        begun_s, done = begun_s + stage.duration_s, done + area


def _inverse(stage: Stage, area: float) -> float:
    """The time at which the level's integral from the stage's begin is `area`."""
    if math.isinf(stage.duration_s) or stage.begin == stage.end:
        return area / stage.begin
    slope = (stage.end - stage.begin) / stage.duration_s
    return (math.sqrt(max(0.0, stage.begin**2 + 2 * slope * area)) - stage.begin) / slope
