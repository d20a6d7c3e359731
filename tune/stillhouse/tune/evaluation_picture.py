"""The picture of an evaluation: what changed against the model that each is held against, with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PICTURE = "changes.png"
_COLORS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e6bbf", "#b8860b")


def draw_changes(rows: list[dict[str, Any]], names: dict[str, str], folder: Path) -> None:
    """Writes changes.png into `folder`: perplexity ratios beside differences in points, a line a model and figure.

    Does nothing where nothing was held against anything.
    """
    changed = [row for row in rows if row.get("change")]
    panels = {
        "perplexity, times the other's": (_points(changed, names, "_perplexity_ratio", 1.0), 1.0),
        "right answers, points more": (_points(changed, names, "_accuracy", 100.0), 0.0),
    }
    panels = {title: panel for title, panel in panels.items() if panel[0]}
    if not panels:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    height = 1.2 + 0.4 * max(len(points) for points, _ in panels.values())
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), height), squeeze=False)
    colors = dict(zip((row["model"] for row in changed), _COLORS * len(changed), strict=False))
    for axes, (title, (points, nothing)) in zip(all_axes[0], panels.items(), strict=True):
        for place, (model, label, value, low, high) in enumerate(reversed(points)):
            axes.plot([low, high], [place, place], color=colors[model], linewidth=2, solid_capstyle="butt")
            axes.plot(value, place, "o", color=colors[model], label=label)
        axes.axvline(nothing, color="#9aa5b1", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(points)), [label for _, label, *_ in reversed(points)])
        axes.set(xlabel=f"{title}; line: 95 % interval", ylim=(-0.6, len(points) - 0.4))
    figure.tight_layout()
    figure.savefig(folder / PICTURE, dpi=150)
    plt.close(figure)


def _points(
    rows: list[dict[str, Any]], names: dict[str, str], ending: str, times: float
) -> list[tuple[str, str, float, float, float]]:
    points = []
    for row in rows:
        for key, found in row["change"].items():
            if key.endswith(ending):
                label = f"{row['model']}: {names[key.removesuffix('_ratio')]}"
                points.append((row["model"], label, *(times * found[end] for end in ("value", "low", "high"))))
    return points
