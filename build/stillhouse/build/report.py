"""What people see of a build: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from stillhouse.build.pipeline import Build, BuildResult
from stillhouse.engine.manifest import GateRecord, Manifest

log = logging.getLogger(__name__)


class BarReporter:
    """A bar for the stage under way and a line for each that is done; for a terminal. A context manager."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
            console=console, transient=True,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._title = ""

    def __enter__(self) -> BarReporter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, name: str, index: int, count: int) -> None:
        self._title = f"[{index}/{count}] {name}"
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(self._title.replace("[", "\\["), total=1.0)

    def share(self, share: float) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=share)

    def done(self, note: str) -> None:
        self._progress.console.print(f"{self._title}: {note}", markup=False, highlight=False)


class LineReporter:
    """A log line when a stage begins to take long and one when it is done; for logs and pipes."""

    def __init__(self) -> None:
        self._title = ""
        self._said = 0.0

    def __enter__(self) -> LineReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def stage(self, name: str, index: int, count: int) -> None:
        self._title, self._said = f"[{index}/{count}] {name}", time.monotonic()

    def share(self, share: float) -> None:
        if time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            log.info("%s: %.0f%%", self._title, 100 * share)

    def done(self, note: str) -> None:
        log.info("%s: %s", self._title, note)


def reporter_for_terminal() -> BarReporter | LineReporter:
    """A bar where stderr is a terminal and nobody asked for quiet, else log lines."""
    if sys.stderr.isatty() and not os.environ.get("STILLHOUSE_QUIET"):
        return BarReporter()
    return LineReporter()


def build_table(results: list[BuildResult]) -> Table:
    """The table at a build's end: precision, bytes, perplexity, ratio, top-1 agreement, gate."""
    table = Table("model", "version", "bytes", "perplexity", "ratio", "top-1", "gate", "what happened")
    for column in table.columns[1:6]:
        column.justify = "right"
    for result in results:
        table.add_row(
            result.model,
            str(result.version or "–"),
            f"{result.bytes:,}",
            f"{result.perplexity:.3f}",
            f"{result.perplexity_ratio:.4f}",
            f"{100 * result.top1_agreement:.1f}%",
            gate_words(result.gate) + (" failed" if result.status == "failed" else " held"),
            {"published": "published", "unchanged": "there already", "failed": "not published"}[result.status],
        )
    return table


def gate_words(gate: GateRecord) -> str:
    """A gate in a few characters, e.g. "≤ 1.15"."""
    words = [f"≤ {gate.perplexity_ratio:g}"] if gate.perplexity_ratio is not None else []
    words += [f"top-1 ≥ {gate.top1_agreement:g}"] if gate.top1_agreement is not None else []
    return ", ".join(words) or "none"


def build_json(build: Build) -> dict[str, Any]:
    """A build for machines: its results, stages and log."""
    return {
        "results": [
            asdict(result) | {"path": str(result.path) if result.path else None, "gate": result.gate.model_dump()}
            for result in build.results
        ],
        "stages": [asdict(stage) for stage in build.stages],
        "log": str(build.log) if build.log else None,
    }


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
                f"attached against merged {merge.max_logit_difference:.2g}",
            )
        )
    if quality is not None:
        rows.append(
            (
                "quality",
                f"perplexity {quality.perplexity:.3f}, ratio {quality.perplexity_ratio:.4f} "
                f"(gate {gate_words(quality.gate)}), KL {quality.kl_mean:.2g}, "
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
    rows += [("file", f"{f.path}  {f.bytes:,}  {f.sha256}") for f in manifest.files]
    rows.append(("tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())))
    for name, words in rows:
        table.add_row(name, words)
    return table
