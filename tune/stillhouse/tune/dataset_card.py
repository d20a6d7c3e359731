"""README.md of a dataset: the card for people, whose front matter Hugging Face's library reads, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def readme(card: dict[str, Any], pictures: list[str]) -> str:
    """The card as Markdown; its figures are those of dataset.json."""
    parts = [
        _front_matter(card),
        f"# {card['name']}, version {card['version']}\n\nMade by `stillhouse data prepare` on {card['created']}, "
        f"seed {card['seed']}. The same inputs give the same bytes. Every figure is in `dataset.json`, what was "
        "dropped and why in `removed.jsonl`, what could not be read in `rejects.jsonl`.",
        "## Splits\n\n" + _table(("split", "records", "file", "sha256"), _splits(card)),
        "## Sources\n\n"
        + _table(
            ("source", "records", "rejected", "sha256"),
            [
                (source["path"], source["records"], source["rejected"], (source["sha256"] or "–")[:16])
                for source in card["sources"]
            ],
        ),
        "## Steps\n\n"
        + _table(
            ("step", "before", "after", "dropped"),
            [(step["stage"], step["before"], step["after"], step["before"] - step["after"]) for step in card["stages"]],
        ),
        *_extras(card),
        _coverage(card["coverage"]),
        "\n\n".join(f"![{name.removesuffix('.svg')}](plots/{name})" for name in pictures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(card: dict[str, Any]) -> str:
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for name, split in card["splits"].items():
        if split["records"]:
            lines += [f"  - split: {name}", f"    path: {split['file']}"]
    return "\n".join([*lines, "---"])


def _splits(card: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(name, split["records"], split["file"], split["sha256"][:16]) for name, split in card["splits"].items()]


def _extras(card: dict[str, Any]) -> list[str]:
    found = [
        f"Held against {one['path']}: {one['records'] - one['rejected']} prompts"
        + (f", and {one['rejected']} records that ask nothing or could not be read." if one["rejected"] else ".")
        for one in card["measured_on"]
    ]
    if card["masked"]:
        kinds = ", ".join(f"{count} × {kind}" for kind, count in card["masked"].items())
        found.append(f"Personal data masked: {kinds}.")
    if scored := card["perplexity"]:
        found.append(
            f"Perplexity of {scored['scored']} answers under {scored['model']}: "
            + ", ".join(f"{value:g} (p{mark})" for mark, value in scored.get("percentiles", {}).items())
            + "."
        )
    if made := card["synthetic"]:
        found.append(
            f"Synthetic: {made['kept']} of {made['asked']} records by {made['model']}, "
            f"{made['prompt_tokens']} + {made['completion_tokens']} tokens, cost {made['cost']:g}; "
            f"{made['asked_again']} answers were outside of the schema and asked for again, {made['unusable']} gave no "
            "record even so. They are marked, and only in train."
        )
    if card["balance"]["method"] == "oversample":
        found.append(f"Oversampled: {card['balance']['added']} repeated records in train, marked `oversampled`.")
    if card["balance"]["method"] == "weights":
        weights = ", ".join(f"{label} {weight:.3g}" for label, weight in card["balance"]["weights"].items())
        found.append(f"Class weights: {weights}.")
    return found


def _coverage(coverage: dict[str, Any]) -> str:
    rows = [
        (" ".join(topic["words"]), topic["records"], " ".join(topic["example"].split())[:80])
        for topic in coverage["topics"]
    ]
    lengths = [
        (name.removesuffix("_chars"), *(f"{value:g}" for value in coverage[name].values()))
        for name in ("prompt_chars", "answer_chars")
    ]
    text = "## Coverage\n\n" + _table(("characters", *coverage["prompt_chars"]), lengths)
    if rows:
        text += "\n\n" + _table(("topic", "records", "such as"), rows)
    thin = "\n".join(f"- {line}" for line in coverage["thin"]) or "- nothing"
    return f"{text}\n\nThin:\n\n{thin}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
