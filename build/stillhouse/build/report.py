"""What people see of a build and its versions: tables and JSON on stdout."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stillhouse.build.results import Build, BuildResult, result_json
from stillhouse.engine.durable import write_text
from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.manifest import GateRecord, Manifest


def build_table(results: list[BuildResult]) -> Table:
    """The table at a build's end: bytes, perplexity, ratio, agreements and tasks kept, gate."""
    headings = ["model", "version", "bytes", "perplexity", "ratio", "top-1", "greedy"]
    headings += ["tasks"] if any(result.task_accuracy_share is not None for result in results) else []
    table = Table(*headings, "gate", "what happened")
    for column in table.columns[1 : len(headings)]:
        column.justify = "right"
    for result in results:
        tasks = [_percent(result.task_accuracy_share)] if "tasks" in headings else []
        table.add_row(
            result.model,
            str(result.version or "–"),
            f"{result.bytes:,}",
            f"{result.perplexity:.3f}",
            f"{result.perplexity_ratio:.4f}",
            _percent(result.top1_agreement),
            _percent(result.greedy_agreement),
            *tasks,
            gate_words(result.gate) + (" failed" if result.status == "failed" else " held"),
            {"published": "published", "unchanged": "there already", "failed": "not published"}[result.status],
        )
    return table


def gate_words(gate: GateRecord) -> str:
    """A gate in a few characters, e.g. "≤ 1.15"."""
    words = [f"≤ {gate.perplexity_ratio:g}"] if gate.perplexity_ratio is not None else []
    words += [f"top-1 ≥ {gate.top1_agreement:g}"] if gate.top1_agreement is not None else []
    words += [f"tasks ≥ {100 * gate.task_accuracy:g}%"] if gate.task_accuracy is not None else []
    return ", ".join(words) or "none"


def build_json(build: Build) -> dict[str, Any]:
    """A build for machines: its results, stages and log."""
    return {
        "results": [result_json(result) for result in build.results],
        "stages": [asdict(stage) for stage in build.stages],
        "log": str(build.log) if build.log else None,
    }


def save_build(build: Build, folder: Path) -> None:
    """Writes build.json into `folder`, and the build's picture beside it where it drew one.

    Raises StillhouseError where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "build.json", json.dumps(build_json(build), indent=2) + "\n")
        if build.log is not None and (picture := build.log / "quality.png").is_file():
            shutil.copyfile(picture, folder / picture.name)
    except OSError as error:
        raise StillhouseError(
            f"--output {folder}: cannot be written: {error.strerror}", hint="what was built stays; name another folder"
        ) from error


def versions_table(rows: list[dict[str, Any]], *, verified: bool) -> Table:
    """The table of `stillhouse versions`."""
    table = Table("model", "version", "precision", "target", "bytes", "ratio", "created", "live")
    if verified:
        table.add_column("files")
    for row in rows:
        ratio = row["perplexity_ratio"]
        cells = [
            row["model"],
            str(row["version"]),
            row["precision"] or "?",
            row["target"] or "?",
            f"{row['bytes']:,}",
            f"{ratio:.4f}" if ratio is not None else "–",
            (row["created"] or "?")[:19],
            "live" if row["live"] else "",
        ]
        table.add_row(*cells, *([row["files"]] if verified else []))
    return table


def manifest_table(path: Path, manifest: Manifest) -> Table:
    """The table of `stillhouse inspect`: a version's facts, a line each."""
    table = Table(show_header=False, title=str(path), title_justify="left")
    network, quality, merge = manifest.network, manifest.quality, manifest.merge
    rows: list[tuple[str, str]] = [
        ("model", f"{manifest.model} version {manifest.version} ({manifest.precision}, {manifest.target})"),
        ("created", manifest.created.isoformat()),
        ("base", f"{manifest.base.id} (sha256 {manifest.base.sha256[:12]}…)"),
    ]
    rows += [("adapter", f"{a.id} × {a.weight:g} (sha256 {a.sha256[:12]}…)") for a in manifest.adapters]
    rows += [
        (
            "network",
            f"{network.architecture}, {network.layers} layers, hidden {network.hidden_size}, "
            f"{network.heads}/{network.kv_heads} heads of {network.head_dim}, vocabulary {network.vocab_size}, "
            f"context {network.context_length}",
        ),
        (
            "memory",
            f"{manifest.memory.weights_bytes:,} bytes of weights, "
            f"{manifest.memory.kv_bytes_per_token:,} bytes of KV cache a token",
        ),
    ]
    if merge is not None and merge.modules_changed:
        rows.append(
            (
                "merge",
                f"{len(merge.modules_changed)} modules changed by at most {100 * merge.relative_change_max:.3g}% "
                f"(median {100 * merge.relative_change_median:.3g}%), "
                f"attached against merged {merge.max_logit_difference:.2g}"
                + (f" of {allowed:.2g} allowed" if (allowed := merge.allowed_logit_difference) is not None else "")
                + (" in FP64" if merge.logits_in == "fp64" else "")
                + (f", KL from base {merge.kl_from_base:.2g}" if merge.kl_from_base is not None else ""),
            )
        )
    if (rounding := manifest.quantization) is not None:
        words_ = f"{rounding.method}, blocks of {rounding.block_size}, {rounding.bytes:,} bytes"
        words_ += f", {len(rounding.int8_weights)} weights kept at 8 bits" if rounding.int8_weights else ""
        words_ += f", {rounding.budget_bytes:,} bytes allowed" if rounding.budget_bytes is not None else ""
        words_ += f", calibrated on {rounding.calibration.text}" if rounding.calibration is not None else ""
        rows.append(("rounding", words_))
    if quality is not None:
        tail = f" (99th percentile {quality.kl_p99:.2g})" if quality.kl_p99 is not None else ""
        rows.append(
            (
                "quality",
                f"perplexity {quality.perplexity:.3f}, ratio {quality.perplexity_ratio:.4f} "
                f"(gate {gate_words(quality.gate)}), KL {quality.kl_mean:.2g}{tail}, "
                f"top-1 {100 * quality.top1_agreement:.1f}% on {quality.tokens:,} tokens of {quality.text}",
            )
        )
        if quality.decode_perplexity_ratio is not None and quality.decode_top1_agreement is not None:
            rows.append(
                (
                    "by decode",
                    f"ratio {quality.decode_perplexity_ratio:.4f}, "
                    f"top-1 {100 * quality.decode_top1_agreement:.1f}% on {quality.decode_tokens} tokens",
                )
            )
        if quality.greedy_agreement is not None:
            share = f"{_percent(quality.greedy_agreement)} of {quality.greedy_tokens} tokens"
            rows.append(("greedy answers", f"{share} before the first that differs, {quality.greedy_prompts} prompts"))
        if (tasks := quality.tasks) is not None:
            kept = f"{_percent(tasks.accuracy_share)} of the original's {tasks.reference_accuracy:.3f}"
            rows.append(("tasks", f"{tasks.accuracy:.3f} of {tasks.tasks} in {tasks.file} are right, {kept}"))
    rows += [("file", f"{f.path}  {f.bytes:,}  {f.sha256}") for f in manifest.files]
    rows.append(("tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())))
    for name, words in rows:
        table.add_row(name, words)
    return table


def diff_table(left: str, right: str, rows: list[dict[str, Any]]) -> Table:
    """The table of `stillhouse diff`; what is the same on both sides is dimmed."""
    table = Table("", left, right)
    for row in rows:
        cells = ["–" if row[side] is None else str(row[side]) for side in ("left", "right")]
        table.add_row(row["key"], *cells, style="dim" if row["same"] else None)
    return table


def print_table(table: Table) -> None:
    """Prints `table` on stdout; a pipe has no width, and is not folded to one."""
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"
