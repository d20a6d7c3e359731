"""What became of a build: its versions, its stages, its log."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from stillhouse.build.plan import Plan, PlannedVersion
from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.manifest import GateRecord, Precision
from stillhouse.engine.policy import live_versions

log = logging.getLogger(__name__)

Status = Literal["published", "unchanged", "failed"]


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What became of one precision; `figures`: all that was measured of it, where it was built now."""

    precision: Precision
    model: str
    status: Status
    version: int | None
    path: Path | None
    bytes: int
    perplexity: float
    perplexity_ratio: float
    top1_agreement: float
    gate: GateRecord
    greedy_agreement: float | None = None
    task_accuracy_share: float | None = None
    figures: dict[str, float] | None = None
    reason: str | None = None
    live: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StageTime:
    """One stage of a build: seconds by the clock and of processors, its process's most memory; nothing where reused."""

    name: str
    seconds: float
    reused: bool
    cpu_seconds: float = 0.0
    peak_rss_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Build:
    """The results by precision, the stages, and where the build's log lies (None where nothing was run)."""

    results: list[BuildResult]
    stages: list[StageTime]
    log: Path | None


def of_existing(version: PlannedVersion) -> BuildResult:
    """The result of a version that is there already."""
    existing = version.existing
    if existing is None or existing.manifest.quality is None:
        raise StillhouseError(f"{version.model} has no quality record", hint="build it again with --force")
    manifest, quality = existing.manifest, existing.manifest.quality
    return BuildResult(
        version.precision,
        version.model,
        "unchanged",
        manifest.version,
        existing.path,
        bytes=sum(file.bytes for file in manifest.files),
        perplexity=quality.perplexity,
        perplexity_ratio=quality.perplexity_ratio,
        top1_agreement=quality.top1_agreement,
        gate=version.gate,
        greedy_agreement=quality.greedy_agreement,
        task_accuracy_share=quality.tasks.accuracy_share if quality.tasks else None,
        live=live_versions(existing.path.parent),
    )


def result_json(result: BuildResult) -> dict[str, Any]:
    """A result for machines."""
    return asdict(result) | {"path": str(result.path) if result.path else None, "gate": result.gate.model_dump()}


def write_log(folder: Path, plan: Plan, created: datetime, build: Build, error: str | None) -> None:
    """Writes build.json into the build's log: what was asked for, what was done, and the error that ended it."""
    record = {
        "created": created.isoformat(),
        "recipe": plan.recipe.model_dump(),
        "repository": str(plan.repository),
        "tools": plan.tools,
        "stages": [asdict(stage) for stage in build.stages],
        "results": [result_json(result) for result in build.results],
        "error": error,
    }
    try:
        (folder / "build.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    except OSError as failure:  # what went wrong before is worth more than that this did
        log.warning("warning: the build's log could not be written: %s", failure)
