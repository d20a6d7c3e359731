"""What changed between two runs, with an interval that says whether it is more than chance.

The interval is a percentile bootstrap (Efron, 1979) of the ratio B / A at 95 %: for latencies the requests of each run
are drawn anew, for throughput the seconds of each run. A metric is worse when its ratio is, and when the whole interval
lies on the worse side.
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
from stillhouse.loadtest.timeline import tokens_by_second

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_DRAWS = 1000
_MOST = 5000  # samples of a run that are drawn from; more do not make the interval better


@dataclass(frozen=True)
class Change:
    """One metric of both runs. `low` and `high` bound the ratio B / A."""

    metric: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    higher_is_worse: bool

    def worse_beyond(self, share: float) -> bool:
        """Whether B is worse than A by more than `share`, and not by chance."""
        if not math.isfinite(self.ratio):
            return False
        if self.higher_is_worse:
            return self.ratio > 1 + share and self.low > 1
        return self.ratio < 1 - share and self.high < 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_samples(path: Path) -> list[Sample]:
    """The samples in a file that `loadtest run --save` wrote. Raises BadInput."""
    hint = "give two JSON files of stillhouse loadtest run --save NAME"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        fields = value["sample_fields"]
        samples = [Sample(**dict(zip(fields, row, strict=True))) for row in value["samples"]]
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}", hint=hint) from None
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path} holds no samples of a load test", hint=hint) from None
    if not samples:
        raise BadInput(f"{path} holds no samples of a load test", hint=hint)
    return samples


def changes(a: Sequence[Sample], b: Sequence[Sample], seed: int = 0) -> list[Change]:
    """Throughput, the median and 95th percentile of each latency, and the share of errors."""
    import numpy as np

    chance = np.random.default_rng(seed)

    def change(metric: str, of_a: list[float], of_b: list[float], figure: Figure, *, higher_is_worse: bool) -> Change:
        first, second = np.asarray(of_a, dtype=float), np.asarray(of_b, dtype=float)
        if not first.size or not second.size:
            return Change(metric, math.nan, math.nan, math.nan, math.nan, math.nan, higher_is_worse)
        before, after = float(figure(first[None, :])[0]), float(figure(second[None, :])[0])
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = figure(_drawn(chance, second)) / figure(_drawn(chance, first))
        ratios = ratios[np.isfinite(ratios)]  # a draw of A without any error has no ratio
        low, high = np.percentile(ratios, (2.5, 97.5)).tolist() if ratios.size else (math.nan, math.nan)
        return Change(metric, before, after, after / before if before else math.nan, low, high, higher_is_worse)

    found = [change("tokens/s", tokens_by_second(a), tokens_by_second(b), _mean, higher_is_worse=False)]
    for name in ("ttft", "answer", "itl", "e2e"):
        of_a, of_b = _latencies_ms(a, name), _latencies_ms(b, name)
        found += [
            change(f"{name} p{percent} ms", of_a, of_b, _percentile(percent), higher_is_worse=True)
            for percent in (50, 95)
        ]
    failed_a, failed_b = ([float(s.outcome not in (OK, CUT)) for s in run] for run in (a, b))
    if any(failed_a) or any(failed_b):
        found.append(change("errors", failed_a, failed_b, _mean, higher_is_worse=True))
    return found


def worse(found: Sequence[Change], share: float) -> list[Change]:
    """The changes to the worse beyond a share; errors where there were none before are one too."""
    return [
        one for one in found if one.worse_beyond(share) or (one.metric == "errors" and one.a == 0 and one.b > share)
    ]


def diff_table(found: Sequence[Change]) -> str:
    rows = [
        [
            one.metric,
            number(one.a, 3),
            number(one.b, 3),
            number(one.ratio, 3),
            f"{number(one.low, 3)} … {number(one.high, 3)}",
        ]
        for one in found
    ]
    return align(["metric", "A", "B", "B / A", "95 % interval"], rows)


def _latencies_ms(samples: Sequence[Sample], name: str) -> list[float]:
    values_s = [getattr(sample, f"{name}_s") for sample in samples if name != "e2e" or sample.outcome == OK]
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
