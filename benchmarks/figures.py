"""From samples to a table: medians, spread, and the ratio of ours to the best peer."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A peer is at equal fidelity when its perplexity is at most so many times ours.
EQUAL_FIDELITY = 1.01


@dataclass(frozen=True, slots=True)
class Column:
    """One figure: its key in a report, its title, and how it reads."""

    key: str
    title: str
    higher_is_better: bool
    scale: float = 1.0
    digits: int = 0


COLUMNS = (
    Column("decode_1", "decode, 1 sequence (tokens/s)", True),
    Column("decode_4", "decode, 4 (tokens/s)", True),
    Column("decode_16", "decode, 16 (tokens/s)", True),
    Column("decode_32", "decode, 32 (tokens/s)", True),
    Column("prefill_256", "prefill, 256 tokens (tokens/s)", True),
    Column("prefill_1024", "prefill, 1,024 tokens (tokens/s)", True),
    Column("ttft_1", "time to first token, alone (ms)", False, 1e3),
    Column("ttft_16_median", "the same, 16 at once, median (ms)", False, 1e3),
    Column("ttft_16_last", "the same, 16 at once, last (ms)", False, 1e3),
    Column("peak_rss_bytes", "peak RSS (MB)", False, 1e-6),
    Column("load_s", "load (s)", False, 1.0, 2),
    Column("start_s", "start of the process to ready (s)", False, 1.0, 2),
    Column("model_bytes", "4-bit model (MB)", False, 1e-6),
    Column("perplexity", "perplexity", False, 1.0, 2),
)

Samples = Mapping[str, Mapping[str, Sequence[float]]]  # peer -> column -> a figure a round


def summary(samples: Sequence[float]) -> dict[str, float]:
    """{"median", "low", "high", "samples"} of at least one sample."""
    return {"median": statistics.median(samples), "low": min(samples), "high": max(samples), "samples": len(samples)}


def perplexity(nll: float, tokens: int) -> float:
    return math.exp(nll / tokens)


def summarise(samples: Samples) -> dict[str, dict[str, dict[str, float]]]:
    return {peer: {key: summary(values) for key, values in of.items() if values} for peer, of in samples.items()}


def ratios(results: Mapping[str, Mapping[str, Mapping[str, float]]], ours: str) -> dict[str, dict[str, Any]]:
    """Column by column the best peer and how many times better ours is (above 1: ours is better).

    `equal` is the same among the peers whose perplexity is at most 1.01 times ours; a peer whose perplexity is not
    known counts as equal.
    """
    limit = EQUAL_FIDELITY * results[ours].get("perplexity", {}).get("median", math.inf)
    equal = {peer for peer, of in results.items() if of.get("perplexity", {}).get("median", 0.0) <= limit}
    table: dict[str, dict[str, Any]] = {}
    for column in COLUMNS:
        medians = {peer: of[column.key]["median"] for peer, of in results.items() if column.key in of}
        mine = medians.pop(ours, None)
        if mine is None or not medians:
            continue
        row = _best(column, mine, medians)
        if among := {peer: value for peer, value in medians.items() if peer in equal}:
            row["equal"] = _best(column, mine, among)
        table[column.key] = row
    return table


def _best(column: Column, mine: float, medians: Mapping[str, float]) -> dict[str, Any]:
    best = (max if column.higher_is_better else min)(medians, key=lambda peer: medians[peer])
    ratio = mine / medians[best] if column.higher_is_better else medians[best] / mine
    return {"best": best, "ratio": ratio}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a table of medians (with their spread), and what each peer ran with."""
    results, best, ours = report["results"], report["ratios"], report["ours"]
    peers = list(results)
    lines = [
        f"| | {' | '.join(peers)} | ours / best peer | at equal fidelity |",
        "|---|" + "--:|" * (len(peers) + 2),
    ]
    for column in COLUMNS:
        if not any(column.key in results[peer] for peer in peers):
            continue
        cells = [_cell(column, results[peer].get(column.key)) for peer in peers]
        row = best.get(column.key)
        cells.append(f"{row['ratio']:.2f} ({row['best']})" if row else "")
        cells.append(f"{row['equal']['ratio']:.2f} ({row['equal']['best']})" if row and "equal" in row else "")
        lines.append(f"| {column.title} | {' | '.join(cells)} |")
    lines += ["", f"A ratio above 1 says that {ours} is better. {_fidelity_note(report)}", ""]
    for peer in peers:
        settings = "; ".join(f"{name}: {value}" for name, value in report["settings"].get(peer, {}).items())
        lines.append(f"- **{peer}**: {settings}")
    lines += [f"- **{peer}** did not run: {why}" for peer, why in report.get("failed", {}).items()]
    machine = report["machine"]
    lines += [
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {' '.join(machine.get('instruction_sets', []))}; "
        f"{report['threads']} threads, {report['rounds']} rounds, prompts' seed {report['seed']}"
        + (f"; streaming read {report['bandwidth_gb_s']:.1f} GB/s" if "bandwidth_gb_s" in report else "")
        + f". Measured {report['measured']}"
        + (" with --quick: not to be quoted." if report.get("quick") else "."),
    ]
    return "\n".join(lines) + "\n"


def _fidelity_note(report: Mapping[str, Any]) -> str:
    reference = report.get("reference_perplexity")
    note = f"Equal fidelity: a perplexity of at most {EQUAL_FIDELITY} times ours, or one that is not known."
    return note + (f" The FP32 checkpoint's perplexity is {reference:.2f}." if reference else "")


def _cell(column: Column, figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "–"
    median, low, high = (f"{figure[name] * column.scale:,.{column.digits}f}" for name in ("median", "low", "high"))
    return median if low == high else f"{median} ({low}–{high})"


def save(report: Mapping[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def publish(report: Mapping[str, Any], table: str, out: Path, pages: Sequence[Path], begin: str, end: str) -> None:
    """Saves the report, prints its table, and puts it between the marks of `pages`."""
    save(report, out)
    print(table)
    for page in pages:
        page.write_text(replace_between(page.read_text(encoding="utf-8"), table, begin, end), encoding="utf-8")


def two_columns(rows: Sequence[tuple[str, str]], report: Mapping[str, Any], how: str) -> str:
    """A table of figures by name, and under it the machine that they are of; `how`: what was run there."""
    machine = report["machine"]
    lines = ["| | |", "|---|--:|", *(f"| {name} | {figure} |" for name, figure in rows), ""]
    about = f"{machine['processor']}, {machine['cores']} cores; {report['threads']} threads, {how}"
    return "\n".join([*lines, f"Machine: {about}. Measured {report['measured']}."]) + "\n"


def replace_between(text: str, table: str, begin: str, end: str) -> str:
    """`text` with what stands between the marker lines `begin` and `end` replaced. Raises ValueError without them."""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the markers {begin} and {end} are not there, one after the other")
    return f"{before}{begin}\n{table}{end}{after}"
