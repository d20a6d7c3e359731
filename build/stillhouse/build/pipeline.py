"""The build: merge → export → quantize → verify → publish, each stage reused where its inputs did not change."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

from stillhouse.build import publish as publishing
from stillhouse.build.cache import Entry, cache_root, is_cached, key_of, prune, stage_entry
from stillhouse.build.checkpoint import Adapter, Checkpoint, open_adapter, open_checkpoint
from stillhouse.build.locks import clear_unheld, held_temporary
from stillhouse.build.quantize import METHODS, Method, builder_options, method_of
from stillhouse.build.recipe import Recipe
from stillhouse.build.texts import LEAST_TOKENS, WINDOW_TOKENS, Text, evaluation_text, token_ids, token_windows
from stillhouse.build.verify import Figures, judge, read_network
from stillhouse.build.worker import StageRun, run_stage
from stillhouse.engine.directory import VersionDirectory
from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.manifest import (
    AdapterRecord,
    BaseRecord,
    FileRecord,
    GateRecord,
    Manifest,
    MemoryRecord,
    MergeRecord,
    ModelRecord,
    Precision,
    QualityRecord,
)
from stillhouse.engine.policy import live_versions

# Raised when the same inputs would give other bytes or other figures than before.
FORMAT = 3
REFERENCE = "FP32 export of the merged checkpoint"
_MAKERS = ("torch", "transformers", "peft", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai", "numpy")
_SCRATCH = "run-"

Status = Literal["published", "unchanged", "failed"]


class Reporter(Protocol):
    """Who is told how far a build is; `report.py` has one for the terminal and one for logs."""

    def stage(self, name: str, index: int, count: int) -> None: ...

    def share(self, share: float) -> None: ...

    def done(self, note: str) -> None: ...


@dataclass(frozen=True, slots=True)
class PlannedVersion:
    """One precision of a plan: how it is made, the hash of its inputs, and the version that has them already."""

    precision: Precision
    model: str
    method: Method
    options: dict[str, str]
    stage_key: str
    inputs_sha256: str
    gate: GateRecord
    existing: VersionDirectory | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a build of `recipe` would do, known before a weight is loaded."""

    recipe: Recipe
    repository: Path
    base: Checkpoint
    adapters: list[Adapter]
    text: Text
    tools: dict[str, str]
    merge_key: str
    reference_key: str
    versions: list[PlannedVersion]


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What became of one precision. `figures` are those of the manifest where nothing had to be built."""

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


def plan(recipe: Recipe, repository: Path, *, force: bool = False) -> Plan:
    """Reads and checks all inputs of `recipe`, hashes them, and looks for versions that have them already.

    Raises StillhouseError for every unsound input that can be told without loading weights.
    """
    publishing.check_repository(repository)
    methods = {
        precision: method_of(precision, recipe.options(precision), recipe.target) for precision in recipe.precisions
    }
    base = open_checkpoint(recipe.base, recipe.revision)
    adapters = [open_adapter(ref, base) for ref in recipe.adapters]
    text = evaluation_text(recipe.evaluate.text)
    if recipe.evaluate.text is not None and (base.path / "tokenizer.json").is_file():
        token_windows(token_ids(text, base.path / "tokenizer.json"), base.context_length)  # refused now, not later
    tools = {name: metadata.version(name) for name in ("stillhouse", *_MAKERS)}
    makers = {name: tools[name] for name in _MAKERS}
    merge_key = key_of(
        {
            "format": FORMAT,
            "base": base.sha256,
            "adapters": [[adapter.sha256, adapter.weight] for adapter in adapters],
            "makers": makers,
        }
    )
    versions: list[PlannedVersion] = []
    for precision, method in methods.items():
        options = builder_options(method, recipe.options(precision))
        stage_key = _stage_key(merge_key, recipe.target, method, options)
        gate = recipe.gate_of(precision)
        inputs = {
            "format": FORMAT,
            "name": recipe.name,
            "made": stage_key,
            "text": text.sha256,
            "gate": gate.model_dump(),
        }
        model = recipe.model_name(precision)
        existing = None if force else publishing.find_same(repository / model, key_of(inputs))
        versions.append(PlannedVersion(precision, model, method, options, stage_key, key_of(inputs), gate, existing))
    reference_key = _stage_key(merge_key, "cpu", METHODS["fp32"][0], {})
    return Plan(recipe, repository, base, adapters, text, tools, merge_key, reference_key, versions)


def build(
    recipe: Recipe,
    repository: Path,
    *,
    force: bool = False,
    no_cache: bool = False,
    make_live: bool = True,
    reporter: Reporter | None = None,
) -> Build:
    """Builds the recipe's precisions into `repository`; those that are there already with the same inputs stay.

    A version that does not hold its gate is not published; its result has the status "failed" and its figures.
    `make_live` moves `version_policy` to a new version; the first version of a model is live in any case.
    """
    run = _Run(plan(recipe, repository, force=force), force, no_cache, make_live, reporter)
    return run.build()


def dry_run(plan_: Plan) -> dict[str, Any]:
    """What `build` would do with this plan: stages, memory and disk in bytes (estimates from measured factors)."""
    root = cache_root()
    weights = 4 * plan_.base.parameters
    vocabulary = int(plan_.base.config["vocab_size"])
    wanted = [version for version in plan_.versions if version.existing is None]
    stages = [] if not wanted else [("merge", plan_.merge_key, 2.2), ("fp32", plan_.reference_key, 1.3)]
    stages += [(v.precision, v.stage_key, v.method.memory_factor) for v in wanted if v.precision != "fp32"]
    runtime = 600_000_000  # torch, transformers and the interpreter
    todo = [(name, factor) for name, key, factor in stages if not is_cached(root, _cache_name(name), key)]
    spool = (LEAST_TOKENS + WINDOW_TOKENS) * vocabulary * 4
    return {
        "versions": [
            {
                "model": version.model,
                "method": version.method.name,
                "existing": version.existing.manifest.version if version.existing else None,
            }
            for version in plan_.versions
        ],
        "stages": [name for name, _ in todo],
        "memory_bytes": max((int(runtime + factor * weights) for _, factor in todo), default=0),
        "disk_bytes": (2 * weights + spool + int(2.2 * weights * len(wanted) / 3)) if wanted else 0,
        "cache": str(root),
    }


class _Run:
    """One build under way: the stages' entries that it holds, its log, its scratch folder."""

    def __init__(self, plan_: Plan, force: bool, no_cache: bool, make_live: bool, reporter: Reporter | None) -> None:
        self.plan = plan_
        self.force = force
        self.no_cache = no_cache
        self.make_live = make_live
        self.reporter = reporter
        self.root = cache_root()
        self.created = datetime.now(timezone.utc).replace(microsecond=0)
        self.wanted = [version for version in plan_.versions if version.existing is None]
        self.count = 3 + 3 * len(self.wanted)
        self.index = 0
        self.stages: list[StageTime] = []
        self.log = self.root / "builds" / f"{self.created:%Y%m%dT%H%M%SZ}-{plan_.recipe.name}-{os.getpid()}"

    def build(self) -> Build:
        results = {version.precision: _of_existing(version) for version in self.plan.versions if version.existing}
        if not self.wanted:
            return Build([results[version.precision] for version in self.plan.versions], [], None)
        self.log.mkdir(parents=True, exist_ok=True)
        prune(self.root)
        error: str | None = None
        try:
            with ExitStack() as stack:
                results |= self._build_wanted(stack)
        except BaseException as failure:
            error = str(failure) or type(failure).__name__
            raise
        finally:
            done = [results[v.precision] for v in self.plan.versions if v.precision in results]
            self._write_log(done, error)
        return Build([results[version.precision] for version in self.plan.versions], self.stages, self.log)

    def _build_wanted(self, stack: ExitStack) -> dict[Precision, BuildResult]:
        merged = self._entry(stack, "merge", "merge", self.plan.merge_key, self._merge_arguments())
        network = read_network(merged.path)
        windows = token_windows(token_ids(self.plan.text, merged.path / "tokenizer.json"), network.context_length)
        fp32 = self._entry(stack, "export fp32", "fp32", self.plan.reference_key, _fp32_arguments(merged.path))
        scratch_root = self.root / "scratch"
        scratch_root.mkdir(parents=True, exist_ok=True)
        clear_unheld(scratch_root, _SCRATCH)
        spool = stack.enter_context(held_temporary(scratch_root, _SCRATCH)) / "reference.f32"
        measured = {"network": network.model_dump(), "windows": windows, "spool": str(spool)}
        self._stage("reference", "reference", {"model": str(fp32.path / "model.onnx"), **measured})
        results: dict[Precision, BuildResult] = {}
        for version in self.wanted:
            with ExitStack() as own:
                made = self._make(own, version, merged, fp32)
                model = made.path / "model.onnx"
                answer = self._stage(f"verify {version.precision}", "fidelity", {"model": str(model), **measured})
                figures = Figures(**answer)
                results[version.precision] = self._publish(version, merged, made, network, figures)
        return results

    def _make(self, stack: ExitStack, version: PlannedVersion, merged: Entry, fp32: Entry) -> Entry:
        if version.stage_key == self.plan.reference_key:
            self.index += 1
            return fp32
        arguments: dict[str, Any]
        if version.method.stage == "convert_fp16":
            arguments = {"source": str(fp32.path)}
        else:
            arguments = {
                "checkpoint": str(merged.path),
                "precision": version.method.builder_precision,
                "target": self.plan.recipe.target,
                "options": version.options,
            }
        call = {"stage": version.method.stage, "arguments": arguments}
        return self._entry(stack, f"make {version.precision}", version.precision, version.stage_key, call)

    def _publish(
        self, version: PlannedVersion, merged: Entry, made: Entry, network: ModelRecord, figures: Figures
    ) -> BuildResult:
        sources = {
            name: folder / name
            for folder in (merged.path, made.path)
            for name in publishing.FILES
            if (folder / name).is_file()
        }
        if missing := publishing.missing_sources(sources):
            raise StillhouseError(f"{version.model} lacks {', '.join(missing)}", hint=f"see {self.log}")
        measured = BuildResult(
            precision=version.precision,
            model=version.model,
            status="failed",
            version=None,
            path=None,
            bytes=sum(file.stat().st_size for file in sources.values()),
            perplexity=figures.perplexity,
            perplexity_ratio=figures.perplexity_ratio,
            top1_agreement=figures.top1_agreement,
            gate=version.gate,
            reason=judge(figures, version.gate),
        )
        if measured.reason is not None:
            self.index += 1
            return measured
        title = f"publish {version.precision}"
        began = self._begin(title)
        runs: list[StageRun] = []

        def probe(directory: Path) -> None:
            arguments = {"directory": str(directory)}
            runs.append(run_stage("probe", arguments, log=self._log_of(title), share=self._share))

        published = publishing.publish(
            sources,
            lambda number, files: self._manifest(version, number, files, merged, network, figures),
            self.plan.repository / version.model,
            probe=probe,
            force=self.force,
            make_live=self.make_live,
        )
        self._end(title, began, runs)
        return replace(
            measured,
            status="published" if published.new else "unchanged",
            version=int(published.path.name),
            path=published.path,
            live=published.live,
        )

    def _manifest(
        self,
        version: PlannedVersion,
        number: int,
        files: list[FileRecord],
        merged: Entry,
        network: ModelRecord,
        figures: Figures,
    ) -> Manifest:
        recipe, text = self.plan.recipe, self.plan.text
        measured = asdict(figures)
        measured.pop("decode_error")
        kv_floats = 2 * network.layers * network.kv_heads * network.head_dim
        half = version.method.stage == "convert_fp16"
        return Manifest(
            name=recipe.name,
            model=version.model,
            version=number,
            precision=version.precision,
            target=recipe.target,
            created=self.created,
            inputs_sha256=version.inputs_sha256,
            base=BaseRecord(id=self.plan.base.id, sha256=self.plan.base.sha256),
            adapters=[
                AdapterRecord(id=a.id, sha256=a.sha256, weight=a.weight, config=a.config) for a in self.plan.adapters
            ],
            recipe=_portable(recipe, self.plan),
            tools=self.plan.tools,
            files=files,
            network=network,
            quality=QualityRecord(
                reference=REFERENCE,
                text=text.label,
                text_sha256=text.sha256,
                gate=version.gate,
                passed=True,
                **measured,
            ),
            merge=MergeRecord.model_validate(merged.result),
            memory=MemoryRecord(
                weights_bytes=sum(file.bytes for file in files if file.path.startswith("model.onnx")),
                kv_bytes_per_token=kv_floats * (2 if half else 4),
            ),
        )

    def _merge_arguments(self) -> dict[str, Any]:
        adapters = [{"path": str(adapter.path), "weight": adapter.weight} for adapter in self.plan.adapters]
        # The opening of the text is enough to compare attached and merged on.
        text = self.plan.text.content[:4000]
        arguments = {"base": str(self.plan.base.path), "adapters": adapters, "probe_text": text}
        return {"stage": "merge", "arguments": arguments}

    def _entry(self, stack: ExitStack, title: str, name: str, key: str, call: dict[str, Any]) -> Entry:
        """The cached entry of a stage, made now where it is not there; held until `stack` closes."""
        began = self._begin(title)
        runs: list[StageRun] = []

        def make(folder: Path) -> dict[str, Any]:
            arguments = call["arguments"] | {"destination": str(folder)}
            runs.append(run_stage(call["stage"], arguments, log=self._log_of(title), share=self._share))
            return runs[0].result

        entry = stack.enter_context(stage_entry(self.root, _cache_name(name), key, make, ignore=self.no_cache))
        self._end(title, began, runs)
        return entry

    def _stage(self, title: str, stage: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Runs a stage whose result is not kept."""
        began = self._begin(title)
        run = run_stage(stage, arguments, log=self._log_of(title), share=self._share)
        self._end(title, began, [run])
        return run.result

    def _log_of(self, title: str) -> Path:
        return self.log / f"{title.replace(' ', '-')}.log"

    def _begin(self, title: str) -> float:
        self.index += 1
        if self.reporter is not None:
            self.reporter.stage(title, self.index, self.count)
        return time.perf_counter()

    def _share(self, share: float) -> None:
        if self.reporter is not None:
            self.reporter.share(share)

    def _end(self, title: str, began: float, runs: list[StageRun]) -> None:
        """Notes the stage's time; without a run it was reused."""
        seconds = round(time.perf_counter() - began, 3)
        time_ = StageTime(title, seconds, reused=not runs)
        if runs:
            time_ = replace(time_, cpu_seconds=runs[0].cpu_seconds, peak_rss_bytes=runs[0].peak_rss_bytes)
        self.stages.append(time_)
        if self.reporter is not None:
            note = f"{seconds:.1f} s, {time_.peak_rss_bytes / 1e9:.1f} GB" if runs else "reused"
            self.reporter.done(note)

    def _write_log(self, results: list[BuildResult], error: str | None) -> None:
        record = {
            "created": self.created.isoformat(),
            "recipe": self.plan.recipe.model_dump(),
            "repository": str(self.plan.repository),
            "tools": self.plan.tools,
            "stages": [asdict(stage) for stage in self.stages],
            "results": [
                asdict(result) | {"path": str(result.path) if result.path else None, "gate": result.gate.model_dump()}
                for result in results
            ],
            "error": error,
        }
        (self.log / "build.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def _stage_key(merge_key: str, target: str, method: Method, options: dict[str, str]) -> str:
    inputs = {
        "merge": merge_key,
        # The converter works on the reference, whatever runs its result.
        "target": "cpu" if method.stage == "convert_fp16" else target,
        "method": method.name,
        "precision": method.builder_precision,
        "options": options,
    }
    return key_of(inputs)


def _fp32_arguments(merged: Path) -> dict[str, Any]:
    arguments = {"checkpoint": str(merged), "precision": "fp32", "target": "cpu", "options": {}}
    return {"stage": "export", "arguments": arguments}


def _cache_name(name: str) -> str:
    return name.replace(" ", "-")


def _portable(recipe: Recipe, plan_: Plan) -> dict[str, Any]:
    """The resolved recipe without this machine's folders: a manifest travels."""
    resolved = recipe.model_dump()
    resolved["base"] = plan_.base.id
    for entry, adapter in zip(resolved["adapters"], plan_.adapters, strict=True):
        entry["path"] = adapter.id
    resolved["evaluate"]["text"] = plan_.text.label if recipe.evaluate.text else None
    return resolved


def _of_existing(version: PlannedVersion) -> BuildResult:
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
        live=live_versions(existing.path.parent),
    )
