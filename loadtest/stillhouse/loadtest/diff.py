"""What changed between two runs, with an interval that says whether it is more than chance.

The interval is a percentile bootstrap (Efron, 1979) of the ratio B / A at 95 %: for latencies the requests of each run
are drawn anew, for throughput the seconds of each run. A metric is worse when its ratio is, and when the whole interval
lies on the worse side; or when only A has it. Errors are compared as the difference B - A in percentage points, since
there may have been none before: they are worse when that is more than a share of A's, and its whole interval above 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.loadtest.errors import BadInput
from stillhouse.loadtest.report import align, number
from stillhouse.loadtest.samples import CUT, OK, Sample
from stillhouse.loadtest.tally import without_nan
from stillhouse.loadtest.timeline import tokens_by_second

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

ERRORS = "errors %"
_DRAWS = 1000
_MOST = 5000  # samples of a run that are drawn from; more do not make the interval better


@dataclass(frozen=True)
class Change:
    """One metric of both runs. `low` and `high` bound the ratio B / A; of errors, the difference in points."""

    metric: str
    a: float
    b: float
    ratio: float  # NaN where there is none
    low: float
    high: float
    higher_is_worse: bool

    def worse_beyond(self, share: float) -> bool:
        """Whether B is worse than A by more than `share`, and not by chance."""
        if self.metric == ERRORS:
            return self.b > self.a * (1 + share) and self.low > 0
        if not math.isfinite(self.ratio):
            return math.isfinite(self.a) and math.isnan(self.b)
        if self.higher_is_worse:
            return self.ratio > 1 + share and self.low > 1
        return self.ratio < 1 - share and self.high < 1

    def __str__(self) -> str:
        if self.metric == ERRORS:
            return f"{self.metric} {self.a:.2f} -> {self.b:.2f}"
        return f"{self.metric} {'gone' if math.isnan(self.b) else f'{self.ratio:.2f} (B / A)'}"

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = without_nan(asdict(self))
        return value


@dataclass(frozen=True)
class SavedRun:
    """What a file of a run says."""

    samples: list[Sample]
    settings: dict[str, Any]
    doubts: list[str]  # why its figures are not those of a whole and valid run


def read_run(path: Path) -> SavedRun:
    """A file that `loadtest run --save` wrote. Raises BadInput."""
    hint = "give two JSON files of stillhouse loadtest run --save NAME"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        fields = value["sample_fields"]
        samples = [Sample(**dict(zip(fields, row, strict=True))) for row in value["samples"]]
        doubts = [f"the load generator could not keep up: {one}" for one in value.get("client", {}).get("problems", [])]
        doubts += [value["ended_early"]] if value.get("ended_early") else []
        doubts += ["it was interrupted"] if value.get("interrupted") else []
        settings = dict(value.get("settings", {}))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}", hint=hint) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path} holds no samples of a load test", hint=hint) from None
    if not samples:
        raise BadInput(f"{path} holds no samples of a load test", hint=hint)
    return SavedRun(samples, settings, doubts)


def different_settings(a: SavedRun, b: SavedRun) -> list[str]:
    """The settings of both that are not the same, with both values; not where the server was."""
    names = [name for name in a.settings if name in b.settings and name != "host"]
    pairs = {name: (a.settings[name], b.settings[name]) for name in names}
    return [f"{name} {before!r} -> {after!r}" for name, (before, after) in pairs.items() if before != after]


def changes(a: Sequence[Sample], b: Sequence[Sample], seed: int = 0) -> list[Change]:
    """Throughput, the median and 95th percentile of each latency, and the share of errors."""
    import numpy as np

    chance = np.random.default_rng(seed)

    def change(metric: str, of_a: list[float], of_b: list[float], figure: Figure, *, higher_is_worse: bool) -> Change:
        first, second = np.asarray(of_a, dtype=float), np.asarray(of_b, dtype=float)
        before, after = (float(figure(of[None, :])[0]) if of.size else math.nan for of in (first, second))
        if not first.size or not second.size:
            return Change(metric, before, after, math.nan, math.nan, math.nan, higher_is_worse)
        if metric == ERRORS:
            points = figure(_drawn(chance, second)) - figure(_drawn(chance, first))
            low, high = np.percentile(points, (2.5, 97.5)).tolist()
            return Change(metric, before, after, after / before if before else math.nan, low, high, higher_is_worse)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = figure(_drawn(chance, second)) / figure(_drawn(chance, first))
        ratios = ratios[np.isfinite(ratios)]  # a draw of A without any token has no ratio
        low, high = np.percentile(ratios, (2.5, 97.5)).tolist() if ratios.size else (math.nan, math.nan)
        return Change(metric, before, after, after / before if before else math.nan, low, high, higher_is_worse)

    found = [change("tokens/s", tokens_by_second(a), tokens_by_second(b), _mean, higher_is_worse=False)]
    for name in ("ttft", "answer", "itl", "e2e"):
        of_a, of_b = _latencies_ms(a, name), _latencies_ms(b, name)
        found += [
            change(f"{name} p{percent} ms", of_a, of_b, _percentile(percent), higher_is_worse=True)
            for percent in (50, 95)
        ]
    failed_a, failed_b = ([100.0 * (s.outcome not in (OK, CUT)) for s in run] for run in (a, b))
    if any(failed_a) or any(failed_b):
        found.append(change(ERRORS, failed_a, failed_b, _mean, higher_is_worse=True))
    return found


def worse(found: Sequence[Change], share: float) -> list[Change]:
    """The changes to the worse beyond a share."""
    return [one for one in found if one.worse_beyond(share)]


def diff_table(found: Sequence[Change]) -> str:
    rows = []
    for one in found:
        bounds = f"{number(one.low, 3)} … {number(one.high, 3)}"
        interval = f"{bounds} points" if one.metric == ERRORS else bounds
        rows.append([one.metric, number(one.a, 3), number(one.b, 3), number(one.ratio, 3), interval])
    return align(["metric", "A", "B", "B / A", "95 % interval"], rows)


def _latencies_ms(samples: Sequence[Sample], name: str) -> list[float]:
    told = (OK,) if name == "e2e" else (OK, CUT)
    values_s = [getattr(sample, f"{name}_s") for sample in samples if sample.outcome in told]
    return [1e3 * value_s for value_s in values_s if value_s is not None]


Figure = Callable[[Any], Any]  # from rows of values (draws, samples) to a number for each row


def _mean(rows: Floats) -> Floats:
    return rows.mean(axis=1)  # type: ignore[no-any-return]


def _percentile(percent: float) -> Figure:
    import numpy as np

    return lambda rows: np.percentile(rows, percent, axis=1)


def _drawn(chance: np.random.Generator, values: Floats) -> Floats:
    """(_DRAWS, samples): the values drawn anew with replacement."""
    if values.size > _MOST:
        values = chance.choice(values, _MOST, replace=False)
    drawn: Floats = values[chance.integers(0, values.size, (_DRAWS, values.size))]
    return drawn
