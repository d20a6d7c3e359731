"""Put the demo's figures into the README: the table between its markers, and docs/demo.svg.

make demo && .venv/bin/python examples/picture.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "demo-out" / "results.json"
PICTURE = ROOT / "docs" / "demo.svg"
README = ROOT / "README.md"


def main() -> int:
    if not RESULTS.is_file():
        print(f"error: {RESULTS.relative_to(ROOT)} is missing", file=sys.stderr)
        print("hint: make demo", file=sys.stderr)
        return 1
    results = json.loads(RESULTS.read_text("utf-8"))
    draw(results["load"])
    block = f"<!-- demo -->\n{table(results)}\n<!-- /demo -->"
    text = README.read_text("utf-8")
    README.write_text(re.sub(r"<!-- demo -->.*?<!-- /demo -->", lambda _: block, text, flags=re.DOTALL), "utf-8")
    return 0


def table(results: dict[str, Any]) -> str:
    """What was asked and said, and one line a precision: latencies are p50 / p95, a GB is 10^9 bytes."""
    lines = [
        f"> **{results['question']}**",
        ">",
        f"> base: {' '.join(results['base'].split())}",
        ">",
        f"> support-int4: {' '.join(results['answers']['support-int4 over gRPC'].split())}",
        "",
        "| precision | tokens/s | TTFT | between tokens | end to end | memory | size |",
        "|---|---|---|---|---|---|---|",
        "| | | p50 / p95, ms | p50 / p95, ms | p50 / p95, ms | GB | GB |",
    ]
    for one in results["load"]:
        summary = one["summary"]
        spreads = [f"{ms(summary[name]['p50_ms'])} / {ms(summary[name]['p95_ms'])}" for name in ("ttft", "itl", "e2e")]
        sizes = [f"{one[name] / 1e9:.2f}" for name in ("memory_bytes", "size_bytes")]
        lines.append(" | ".join([f"| {one['precision']}", f"{summary['tokens_per_s']:.0f}", *spreads, *sizes]) + " |")
    return "\n".join(lines)


def ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def draw(load: list[dict[str, Any]]) -> None:
    """Three small bar charts side by side: throughput, time to first token, size."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "stillhouse"  # the same picture from the same figures
    from matplotlib import pyplot

    names = [one["precision"] for one in load]
    charts = {
        "throughput, tokens/s": [one["summary"]["tokens_per_s"] for one in load],
        "TTFT p50, ms": [one["summary"]["ttft"]["p50_ms"] for one in load],
        "size, MB": [one["size_bytes"] / 1e6 for one in load],
    }
    figure, axes = pyplot.subplots(1, len(charts), figsize=(9, 2.6), layout="constrained")
    for axis, (title, values) in zip(axes, charts.items(), strict=True):
        bars = axis.bar(names, values, color=["#8c6d46", "#c08a3e", "#e0b050"], width=0.6)
        axis.bar_label(bars, fmt="%.0f", fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.set_yticks([])
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
