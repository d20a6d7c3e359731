"""How the load changes over time: stages of a TOML file, or one of four by name.

unit = "rate"                        # requests a second (open loop), or "users" (closed loop)
[[stage]]
duration_s = 30
level = 4                            # or: from = 1, to = 8

"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.loadtest.arrivals import Stage
from stillhouse.loadtest.errors import BadInput

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

_FORM = 'unit = "rate" or "users", then [[stage]] tables of duration_s and level (or from and to)'
_KEYS = {"duration_s", "level", "from", "to"}


@dataclass(frozen=True)
class Shape:
    """Stages of requests a second, or of users; `for_ever`: the last level stays until the test is ended."""

    stages: tuple[Stage, ...]
    in_users: bool
    for_ever: bool = False

    @property
    def duration_s(self) -> float:
        return sum(stage.duration_s for stage in self.stages)


def ramp(level: float) -> tuple[Stage, ...]:
    """From nothing to twice the level: where does it break?"""
    return (Stage(60, 0, 2 * level),)


def steps(level: float) -> tuple[Stage, ...]:
    """Quarter, half, three quarters, whole, five quarters: throughput against latency."""
    return tuple(Stage(20, part * level, part * level) for part in (0.25, 0.5, 0.75, 1.0, 1.25))


def spike(level: float) -> tuple[Stage, ...]:
    """Five times the level for ten seconds: how long until it has recovered?"""
    return (Stage(20, level, level), Stage(10, 5 * level, 5 * level), Stage(30, level, level))


def soak(level: float) -> tuple[Stage, ...]:
    """The level for an hour: does memory grow, does latency creep?"""
    return (Stage(3600, level, level),)


NAMED: dict[str, Callable[[float], tuple[Stage, ...]]] = {"ramp": ramp, "steps": steps, "spike": spike, "soak": soak}


def load_shape(name: str, level: float | None = None) -> Shape:
    """A shape by its name at a level (requests a second), or of a TOML file. Raises BadInput."""
    if name in NAMED:
        if not level:
            raise BadInput(f"the shape {name} is of a rate", hint=f"for example --rate 4: {_said(NAMED[name])}")
        return Shape(NAMED[name](level), in_users=False)
    path = Path(name)
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = f"a shape is {', '.join(NAMED)} or a TOML file"
        raise BadInput(f"cannot read the shape {name}: {error.strerror}", hint=hint) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"the shape {name} is not TOML: {error}", hint=_FORM) from None
    unit, tables = value.get("unit", "rate"), value.get("stage")
    if unit not in ("rate", "users") or not isinstance(tables, list) or not tables or set(value) - {"unit", "stage"}:
        raise BadInput(f"the shape {name} has no stages of a known unit", hint=_FORM)
    stages = tuple(_stage(table, f"{name}, stage {n}") for n, table in enumerate(tables, start=1))
    if all(stage.area == 0 for stage in stages):
        raise BadInput(f"the shape {name} never asks anything: every level is 0", hint=_FORM)
    return Shape(stages, in_users=unit == "users")


def _stage(table: Any, where: str) -> Stage:
    if not isinstance(table, dict) or set(table) - _KEYS:
        strange = ", ".join(sorted(set(table) - _KEYS)) if isinstance(table, dict) else repr(table)
        raise BadInput(f"{where}: unknown {strange}", hint=_FORM)
    duration_s = _number(table.get("duration_s"), f"{where}: duration_s")
    begin = _number(table.get("from", table.get("level")), f"{where}: level")
    end = _number(table.get("to", table.get("level")), f"{where}: level")
    if duration_s == 0:
        raise BadInput(f"{where}: duration_s is above 0", hint=_FORM)
    return Stage(duration_s, begin, end)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise BadInput(f"{what} is a number from 0, got {value!r}", hint=_FORM)
    return float(value)


def _said(shape: Callable[[float], tuple[Stage, ...]]) -> str:
    return (shape.__doc__ or "").rstrip(".")
