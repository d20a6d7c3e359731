"""The report's pictures as SVG text, drawn by matplotlib: they stand in the page itself, and need nothing else."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stillhouse.loadtest.samples import CUT, OK, Sample
from stillhouse.loadtest.timeline import Step, in_flight, tokens_by_second

_MOST_DOTS = 1500
_NAMES = {"ttft": "TTFT", "answer": "first answer token", "itl": "between tokens", "e2e": "end to end"}
_COLOURS = {"ttft": "#2563eb", "answer": "#9333ea", "itl": "#059669", "e2e": "#ea580c"}


def latency_over_time(samples: Sequence[Sample]) -> str:
    """A dot a request, by when it was to be sent."""
    zero_s = min(sample.start_s for sample in samples)
    done = [sample for sample in samples if sample.outcome == OK]
    shown = done[:: math.ceil(len(done) / _MOST_DOTS) or 1]
    failed = [sample.start_s - zero_s for sample in samples if sample.outcome not in (OK, CUT)][:_MOST_DOTS]

    def draw(axes: Any) -> None:
        for name in ("ttft", "e2e"):
            dots = [(s.start_s - zero_s, 1e3 * value) for s in shown if (value := getattr(s, f"{name}_s")) is not None]
            axes.scatter(*zip(*dots, strict=True) if dots else ((), ()), s=6, c=_COLOURS[name], label=_NAMES[name])
        if failed:
            low = axes.get_xaxis_transform()  # x in seconds, y a share of the height
            axes.plot(failed, [0.02] * len(failed), "x", color="#dc2626", label="failed", transform=low)
        axes.set(xlabel="s since the start")
        _in_ms(axes)
        axes.legend(frameon=False)

    return _svg(draw)


def percentile_curves(curves: Mapping[str, Sequence[Sequence[float | None]]]) -> str:
    """Latency by percentile, the high ones drawn apart as 1 / (1 - p). One curve by its latency's or model's name."""
    ticks = (0, 50, 90, 99, 99.9)

    def place(percent: float) -> float:
        return -math.log10(max(1 - percent / 100, 1e-4))

    def draw(axes: Any) -> None:
        for name, curve in curves.items():
            points = [(place(p), ms) for p, ms in curve if p is not None and ms is not None and p < 100]
            axes.plot(*zip(*points, strict=True), color=_COLOURS.get(name), label=_NAMES.get(name, name))
        axes.set(xlabel="percentile")
        _in_ms(axes)
        axes.set_xticks([place(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
        axes.legend(frameon=False)

    return _svg(draw)


def throughput_over_time(samples: Sequence[Sample]) -> str:
    """Tokens that arrived each second, and how many were under way."""
    bins, flight = tokens_by_second(samples), in_flight(samples)

    def draw(axes: Any) -> None:
        axes.step(range(len(bins)), bins, where="post", color="#2563eb", label="tokens/s")
        axes.plot(
            [t for t, _, _ in flight], [tokens for _, _, tokens in flight], color="#ea580c", label="tokens in flight"
        )
        axes.set(xlabel="s since the start", ylabel="tokens", ylim=(0, None))
        beside = axes.twinx()
        beside.plot([t for t, _, _ in flight], [requests for _, requests, _ in flight], ":", color="#6b7280")
        beside.set(ylabel="requests in flight (dotted)", ylim=(0, None))
        axes.legend(frameon=False, loc="lower right")

    return _svg(draw)


def throughput_against_latency(steps: Sequence[Step]) -> str:
    """Where more load brings no more tokens, only waiting."""

    def draw(axes: Any) -> None:
        known = [step for step in steps if math.isfinite(step.summary.ttft.p95_ms)]
        tokens_per_s = [step.summary.tokens_per_s for step in known]
        ttft_ms, itl_ms = ([getattr(step.summary, name).p95_ms for step in known] for name in ("ttft", "itl"))
        axes.plot(tokens_per_s, ttft_ms, "o-", color=_COLOURS["ttft"], label="TTFT p95")
        axes.plot(tokens_per_s, itl_ms, "s-", color=_COLOURS["itl"], label="ITL p95")
        for step, *place in zip(known, tokens_per_s, ttft_ms, strict=True):
            axes.annotate(step.label, place, xytext=(4, 4), textcoords="offset points")
        axes.set(xlabel="tokens/s")
        _in_ms(axes)
        axes.legend(frameon=False)

    return _svg(draw)


def _in_ms(axes: Any) -> None:
    """An axis of milliseconds; where there are some, it is logarithmic with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(ylabel="ms")
    if not math.isfinite(axes.dataLim.minposy):
        return  # nothing is above 0: nothing came
    axes.set(yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(draw: Callable[[Any], None]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Text stays text: a reader can search it, and the file stays small.
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "stillhouse"}):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
