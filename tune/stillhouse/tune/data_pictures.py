"""The pictures of a dataset: what each filter left, classes, lengths and topics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse.tune.splitting import SPLITS

_BLUE, _GREY = "#1b6ca8", "#9aa5b1"
_COLOURS = {"train": _BLUE, "validation": "#d98e04", "test": "#5b8c5a"}
_MOST_CLASSES = 30


def draw_dataset(card: dict[str, Any], lengths: dict[str, list[int]], folder: Path) -> list[str]:
    """Writes the pictures that the card has figures for into `folder`; their names. `lengths` are in characters."""
    import matplotlib as mpl

    mpl.use("Agg")
    # The same figures give the same SVG.
    mpl.rcParams["svg.hashsalt"] = "stillhouse"

    folder.mkdir()
    names = [_stages(card, folder), _lengths(lengths, folder)]
    if card["coverage"]["classes"]:
        names.append(_classes(card, folder))
    if card["coverage"]["topics"]:
        names.append(_topics(card, folder))
    return names


def _stages(card: dict[str, Any], folder: Path) -> str:
    figure, axes = _axes(len(card["stages"]))
    names = [stage["stage"] for stage in card["stages"]]
    axes.barh(names, [stage["before"] for stage in card["stages"]], color=_GREY, label="before")
    axes.barh(names, [stage["after"] for stage in card["stages"]], color=_BLUE, label="after")
    axes.set(title="Records before and after each step", xlabel="records")
    axes.legend(frameon=False)
    return _saved(figure, axes, folder / "steps.svg")


def _classes(card: dict[str, Any], folder: Path) -> str:
    classes = card["coverage"]["classes"]
    largest = sorted(classes, key=lambda name: (-sum(classes[name].values()), name))[:_MOST_CLASSES]
    figure, axes = _axes(len(largest))
    left = [0] * len(largest)
    for split in SPLITS:
        counts = [classes[name][split] for name in largest]
        axes.barh(largest, counts, left=left, color=_COLOURS[split], label=split)
        left = [before + count for before, count in zip(left, counts, strict=True)]
    axes.set(title="Records by class", xlabel="records")
    axes.legend(frameon=False)
    return _saved(figure, axes, folder / "classes.svg")


def _lengths(lengths: dict[str, list[int]], folder: Path) -> str:
    figure, axes = _axes(8)
    for name, colour in (("prompt", _GREY), ("answer", _BLUE)):
        axes.hist(lengths[name], bins=40, histtype="step", color=colour, label=name, linewidth=1.5)
    axes.set(title="Lengths", xlabel="characters", ylabel="records", yscale="log")
    axes.legend(frameon=False)
    return _saved(figure, axes, folder / "lengths.svg", inverted=False)


def _topics(card: dict[str, Any], folder: Path) -> str:
    topics = card["coverage"]["topics"]
    figure, axes = _axes(len(topics))
    places = range(len(topics))
    axes.barh(places, [topic["records"] for topic in topics], color=_BLUE)
    axes.set_yticks(places, [" ".join(topic["words"]) for topic in topics], fontsize=8)
    axes.set(title="Topics of the prompts", xlabel="records in the sample")
    return _saved(figure, axes, folder / "topics.svg")


def _axes(rows: int) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(7, max(2.5, 0.8 + 0.28 * rows)), layout="constrained")


def _saved(figure: Any, axes: Any, file: Path, *, inverted: bool = True) -> str:
    from matplotlib import pyplot as plt

    if inverted:
        axes.invert_yaxis()
    axes.grid(visible=True, alpha=0.2)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return file.name
