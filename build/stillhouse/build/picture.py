"""The picture of a build: bytes against perplexity ratio, a point a version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.build.results import Build
from stillhouse.engine.directory import model_directories, open_version, version_numbers
from stillhouse.engine.errors import VersionError


@dataclass(frozen=True, slots=True)
class Point:
    """A version: its label, bytes, perplexity ratio, and whether this build made it, it was there, or it failed."""

    label: str
    bytes: int
    perplexity_ratio: float
    kind: str


_STYLES: dict[str, dict[str, Any]] = {
    "this build": {"color": "#1b6ca8", "marker": "o"},
    "there before": {"color": "#9aa5b1", "marker": "o"},
    "not published": {"color": "#c0392b", "marker": "x"},
}


def draw_build(build: Build, repository: Path, name: str) -> None:
    """Writes quality.png and quality.svg into the build's folder; other versions of `name` are shown too.

    Does nothing where the build has no folder, because it ran nothing.
    """
    if build.log is None:
        return
    points = [
        Point(
            result.model.removeprefix(f"{name}-") + (f" v{result.version}" if result.version else ""),
            result.bytes,
            result.perplexity_ratio,
            {"failed": "not published", "unchanged": "there before"}.get(result.status, "this build"),
        )
        for result in build.results
    ]
    known = {result.path for result in build.results}
    draw(points + _others(repository, name, known), build.log, title=name)


def draw(points: list[Point], folder: Path, *, title: str) -> None:
    """Writes quality.png and quality.svg into `folder`."""
    import matplotlib as mpl

    mpl.use("Agg")
    # The same figures give the same SVG.
    mpl.rcParams["svg.hashsalt"] = "stillhouse"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for kind, style in _STYLES.items():
        own = [point for point in points if point.kind == kind]
        if own:
            sizes = [point.bytes / 1e6 for point in own]
            axes.scatter(sizes, [point.perplexity_ratio for point in own], label=kind, **style)
    for point in points:
        at = (point.bytes / 1e6, point.perplexity_ratio)
        axes.annotate(point.label, at, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.axhline(1.0, color="#9aa5b1", linewidth=0.8, linestyle=":")
    axes.set(title=title, xlabel="size, MB", ylabel="perplexity ratio to the FP32 merge")
    axes.set_xlim(left=0)
    axes.grid(visible=True, alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(folder / "quality.png", dpi=150)
    figure.savefig(folder / "quality.svg", metadata={"Date": None})
    plt.close(figure)


def _others(repository: Path, name: str, known: set[Path | None]) -> list[Point]:
    points: list[Point] = []
    if not repository.is_dir():  # nothing was ever published
        return points
    for model in model_directories(repository):
        for number in version_numbers(model):
            directory = model / str(number)
            try:
                manifest = open_version(directory, verify=False).manifest
            except VersionError:
                continue
            if manifest.name == name and manifest.quality is not None and directory not in known:
                size = sum(file.bytes for file in manifest.files)
                label = f"{manifest.precision} v{number}"
                points.append(Point(label, size, manifest.quality.perplexity_ratio, "there before"))
    return points
