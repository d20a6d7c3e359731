"""What the command line's words mean: durations and shares."""

from __future__ import annotations

import math
from pathlib import Path

from stillhouse.loadtest.errors import BadInput
from stillhouse.loadtest.prompts import load_workload


def parse_duration_s(text: str) -> float:
    """Seconds in "15", "15s", "2m" or "1h". Raises BadInput."""
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    if not number.isdecimal() or int(number) < 1:
        raise BadInput(f"a duration is a whole number of s, m or h, got {text!r}", hint="for example 15s or 2m")
    return float(int(number) * unit)


def duration_of(duration: str | None, prompts: Path | None) -> float:
    """A trace lasts as long as it is, unless it is said how long."""
    if duration is not None:
        return parse_duration_s(duration)
    times_s = load_workload(prompts).times_s if prompts is not None else None
    return 15.0 if times_s is None else times_s[-1] + 1.0


def parse_rate(text: str | float) -> float:
    """Requests a second in "2.5" or "2.5/s". Raises BadInput."""
    try:
        rate = float(str(text).removesuffix("/s"))
    except ValueError:
        rate = math.nan
    if not 0 <= rate < math.inf:
        raise BadInput(f"a rate is a number of requests a second from 0, got {text!r}", hint="for example --rate 2.5")
    return rate


def parse_share(text: str) -> float:
    """The share in "10%" or "10": 0.1. Raises BadInput."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < math.inf:
        raise BadInput(f"a share is a number of per cent from 0, got {text!r}", hint="for example --fail-over 10%")
    return share
