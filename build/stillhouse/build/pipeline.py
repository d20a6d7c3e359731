"""The build: merge → export → quantize → verify → publish, each stage reused where its inputs did not change."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stillhouse.build import publish as publishing
from stillhouse.build.answers import Replies, compare, judge_tasks
from stillhouse.build.cache import Entry, cache_root, scratch_in, stage_entry
from stillhouse.build.plan import Plan, PlannedVersion, plan
from stillhouse.build.progress import Reporter
from stillhouse.build.recipe import Recipe
from stillhouse.build.record import manifest_of
from stillhouse.build.results import Build, BuildResult, StageTime, of_existing, write_log
from stillhouse.build.texts import excerpts, token_ids, token_windows
from stillhouse.build.verify import Figures, judge, read_network
from stillhouse.build.worker import StageRun, run_stage
from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.manifest import ModelRecord, Precision

log = logging.getLogger(__name__)


def build(
    recipe: Recipe,
    repository: Path,
    *,
    force: bool = False,
    no_cache: bool = False,
    make_live: bool = True,
    reporter: Reporter | None = None,
    on_result: Callable[[BuildResult], None] = lambda _: None,
) -> Build:
    """Builds the recipe's precisions into `repository`; those that are there already with the same inputs stay.

    A version that does not hold its gate is not published; its result has the status "failed" and its figures.
    `make_live` moves `version_policy` to a new version; the first version of a model is live in any case.
    `on_result` hears of each version as soon as it is done: a later one's error takes nothing from it.
    """
    began = time.perf_counter()
    if reporter is not None:
        reporter.stage("check", 0, 0)  # every input is read and hashed
    planned = plan(recipe, repository, force=force)
    if reporter is not None:
        reporter.done(f"{time.perf_counter() - began:.1f} s")
    return _Run(planned, force, no_cache, make_live, reporter, on_result).build()


class _Run:
    """One build under way: the stages' entries that it holds, its log, its scratch folder."""

    def __init__(
        self,
        plan_: Plan,
        force: bool,
        no_cache: bool,
        make_live: bool,
        reporter: Reporter | None,
        on_result: Callable[[BuildResult], None],
    ) -> None:
        self.plan = plan_
        self.force = force
        self.no_cache = no_cache
        self.make_live = make_live
        self.reporter = reporter
        self.on_result = on_result
        self.root = cache_root()
        self.created = datetime.now(timezone.utc).replace(microsecond=0)
        self.wanted = [version for version in plan_.versions if version.existing is None]
        self.count = 4 + 4 * len(self.wanted) + sum(version.calibration_key is not None for version in self.wanted)
        self.index = 0
        self.stages: list[StageTime] = []
        self.results: dict[Precision, BuildResult] = {}
        self.scratch: Path | None = None
        self.log = self.root / "builds" / f"{self.created:%Y%m%dT%H%M%SZ}-{plan_.recipe.name}-{os.getpid()}"

    def build(self) -> Build:
        self.results = {version.precision: of_existing(version) for version in self.plan.versions if version.existing}
        for version in self.plan.versions:  # what a build that was killed left there
            publishing.clear_leftovers(self.plan.repository / version.model)
        if not self.wanted:
            return Build(self._done(), [], None)
        with ExitStack() as stack:
            self.scratch = stack.enter_context(scratch_in(self.root, keep=self.plan.entry_names()))
            self.log.mkdir(parents=True, exist_ok=True)
            error: str | None = None
            try:
                self._build_wanted(stack, self.scratch)
            except BaseException as failure:
                error = str(failure) or type(failure).__name__
                raise
            finally:
                write_log(self.log, self.plan, self.created, Build(self._done(), self.stages, self.log), error)
        return Build(self._done(), self.stages, self.log)

    def _done(self) -> list[BuildResult]:
        """What there is so far, in the recipe's order."""
        return [self.results[v.precision] for v in self.plan.versions if v.precision in self.results]

    def _build_wanted(self, stack: ExitStack, scratch: Path) -> None:
        merged = self._entry(stack, "merge", "merge", self.plan.merge_key, self._merge_arguments())
        for line in merged.result.get("warnings", []):
            log.warning("warning: %s", line)
        network = read_network(merged.path)
        windows = token_windows(token_ids(self.plan.text, merged.path / "tokenizer.json"), network.context_length)
        fp32 = self._entry(stack, "export fp32", "fp32", self.plan.reference_key, _fp32_arguments(merged.path))
        spool = scratch / "reference.f32"
        measured = {"network": network.model_dump(), "windows": windows, "spool": str(spool)}
        self._stage("reference", "reference", {"model": str(fp32.path / "model.onnx"), **measured})
        said = self._answers("fp32", fp32, merged, network)
        for version in self.wanted:
            with ExitStack() as own:
                made = self._make(own, version, merged, fp32, network)
                model = made.path / "model.onnx"
                answer = self._stage(f"verify {version.precision}", "fidelity", {"model": str(model), **measured})
                replies = compare(said, self._answers(version.precision, made, merged, network), self.plan.tasks)
                result = self._publish(version, merged, made, network, Figures(**answer), replies)
                self.results[version.precision] = result
                self.on_result(result)

    def _make(
        self, stack: ExitStack, version: PlannedVersion, merged: Entry, fp32: Entry, network: ModelRecord
    ) -> Entry:
        if version.stage_key == self.plan.reference_key:
            self.index += 1
            return fp32
        arguments: dict[str, Any]
        if version.method.stage == "convert_fp16":
            arguments = {"source": str(fp32.path), "target": self.plan.recipe.target}
        else:
            arguments = {
                "checkpoint": str(merged.path),
                "graph": str(fp32.path),
                "network": network.model_dump(),
                "target": self.plan.recipe.target,
                **version.options,
            }
            if version.calibration_key is not None:
                calibration = self._calibration(stack, version, merged, fp32, network)
                arguments["calibration"] = str(calibration.path / "calibration.json")
        call = {"stage": version.method.stage, "arguments": arguments}
        return self._entry(stack, f"make {version.precision}", version.precision, version.stage_key, call)

    def _calibration(
        self, stack: ExitStack, version: PlannedVersion, merged: Entry, fp32: Entry, network: ModelRecord
    ) -> Entry:
        arguments: dict[str, Any] = {"model": str(fp32.path / "model.onnx"), "checkpoint": str(merged.path)}
        arguments |= {"network": network.model_dump(), "text": self.plan.recipe.options(version.precision).calibration}
        call = {"stage": "calibrate", "arguments": arguments}
        return self._entry(stack, "calibrate", "calibrate", str(version.calibration_key), call)

    def _answers(self, precision: str, made: Entry, merged: Entry, network: ModelRecord) -> dict[str, Any]:
        tasks = [task.model_dump() for task in self.plan.tasks.tasks] if self.plan.tasks else []
        arguments = {"model": str(made.path / "model.onnx"), "network": network.model_dump(), "tasks": tasks}
        return self._stage(f"ask {precision}", "answers", arguments | {"tokenizer": str(merged.path)})

    def _publish(
        self,
        version: PlannedVersion,
        merged: Entry,
        made: Entry,
        network: ModelRecord,
        figures: Figures,
        replies: Replies,
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
            greedy_agreement=replies.greedy_agreement,
            task_accuracy_share=replies.tasks.accuracy_share if replies.tasks else None,
            figures=asdict(figures),
            reason=judge(figures, version.gate) or judge_tasks(replies.tasks, version.gate),
        )
        if measured.reason is not None:
            self.index += 1
            return measured
        title = f"publish {version.precision}"
        began = self._begin(title)
        runs: list[StageRun] = []

        def probe(directory: Path) -> None:
            arguments = {"directory": str(directory)}
            runs.append(self._run("probe", arguments, title))

        published = publishing.publish(
            sources,
            lambda number, files: manifest_of(
                self.plan,
                version,
                number,
                files,
                created=self.created,
                network=network,
                merge=merged.result,
                figures=figures,
                replies=replies,
                quantization=made.result.get("quantization"),
            ),
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

    def _merge_arguments(self) -> dict[str, Any]:
        if self.plan.base.quantized:
            return {"stage": "unpack", "arguments": {"base": str(self.plan.base.path)}}
        adapters = [{"path": str(adapter.path), "weight": adapter.weight} for adapter in self.plan.adapters]
        arguments: dict[str, Any] = {"base": str(self.plan.base.path), "adapters": adapters}
        arguments |= {"probe_texts": excerpts(self.plan.text), "trust_remote_code": self.plan.recipe.trust_remote_code}
        return {"stage": "merge", "arguments": arguments}

    def _entry(self, stack: ExitStack, title: str, name: str, key: str, call: dict[str, Any]) -> Entry:
        """The cached entry of a stage, made now where it is not there; held until `stack` closes."""
        began = self._begin(title)
        runs: list[StageRun] = []

        def make(folder: Path) -> dict[str, Any]:
            arguments = call["arguments"] | {"destination": str(folder)}
            runs.append(self._run(call["stage"], arguments, title))
            return runs[0].result

        entry = stack.enter_context(stage_entry(self.root, name, key, make, ignore=self.no_cache))
        self._end(title, began, runs)
        return entry

    def _stage(self, title: str, stage: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Runs a stage whose result is not kept."""
        began = self._begin(title)
        run = self._run(stage, arguments, title)
        self._end(title, began, [run])
        return run.result

    def _run(self, stage: str, arguments: dict[str, Any], title: str) -> StageRun:
        """Runs a stage with its log and its temporary files among this build's own."""
        log_file = self.log / f"{title.replace(' ', '-')}.log"
        return run_stage(stage, arguments, log=log_file, share=self._share, temporary=self.scratch)

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


def _fp32_arguments(merged: Path) -> dict[str, Any]:
    arguments = {"checkpoint": str(merged), "precision": "fp32", "target": "cpu", "options": {}}
    return {"stage": "export", "arguments": arguments}
