"""The same load on several models, in turns, and the table that comes of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse.client import Client, ClientError, ModelEntry
from stillhouse.loadtest.errors import BadInput
from stillhouse.loadtest.load import Load
from stillhouse.loadtest.report import align, number
from stillhouse.loadtest.run import LoadResult, merged, run_locust
from stillhouse.loadtest.server_metrics import version_size_bytes
from stillhouse.loadtest.target import OPENAI, Target, choose_model, open_target, resolve

PRECISIONS = ("fp32", "fp16", "int8", "int4")


@dataclass(frozen=True)
class Compared:
    """One line of the table: `load` is all rounds together."""

    precision: str  # or the model's name, where it ends in none
    load: LoadResult
    size_bytes: int | None
    rounds: tuple[LoadResult, ...] = ()

    @property
    def tokens_per_s(self) -> list[float]:
        """Of each round."""
        return [one.summary.tokens_per_s for one in self.rounds or (self.load,)]

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "size_bytes": self.size_bytes,
            "tokens_per_s_of_rounds": self.tokens_per_s,
            **self.load.to_json(whole=False),
        }


def precision_of(model: str) -> str:
    ending = model.rsplit("-", 1)[-1]
    return ending if ending in PRECISIONS else model


def compare_models(
    url: str,
    models: Sequence[str] = (),
    load: Load | None = None,
    *,
    rounds: int = 1,
    ignore_eos: bool = True,
    api_key: str = "",
    metrics_url: str | None = None,
    repository: Path | None = None,
    progress: Callable[[str], None] | None = None,
    compared: list[Compared] | None = None,
) -> list[Compared]:
    """Drives the models (all that are ready, where none is named) in turns, with `load`, `rounds` times each.

    Taking turns lets what the machine does meanwhile fall on all of them alike. Every answer has the load's
    `max_tokens` tokens (`ignore_eos`), from the same prompts in the same order. `repository` is the server's, where it
    is on this machine, for the sizes. `compared` is filled while it goes on: it is what an error leaves. Raises
    ClientError, LoadtestError or KeyboardInterrupt.
    """
    compared = [] if compared is None else compared
    load = replace(load or Load(), ignore_eos=ignore_eos)
    protocol, base_url = resolve(url, load.protocol)
    load = replace(load, protocol=protocol)
    target = open_target(base_url, protocol, api_key=api_key)
    try:
        chosen = _choose(target, models)
        versions = {} if load.protocol == OPENAI else _ready_versions(url)
        for model in chosen:
            # The first request of a process pays for what is done once; no user should.
            _warm_up(target, model, chat=load.protocol == OPENAI)
    finally:
        target.close()
    results: dict[str, list[LoadResult]] = {model: [] for model in chosen}
    for turn in range(rounds):
        for model in chosen:
            if progress:
                which = f", round {turn + 1} of {rounds}" if rounds > 1 else ""
                progress(f"{model}: {load.said}, {load.duration_s:g} s{which}")
            this_load = replace(load, seed=load.seed + turn)
            result = run_locust(base_url, model, this_load, metrics_url=metrics_url, api_key=api_key)
            if result.failure is None or not results[model]:  # a round that was cut short is better than none
                results[model].append(result)
            compared[:] = [
                Compared(
                    precision_of(model),
                    merged(rounds),
                    version_size_bytes(repository, model, versions.get(model, "")) if repository else None,
                    tuple(rounds),
                )
                for model, rounds in results.items()
                if rounds
            ]
            if result.failure is not None:
                raise result.failure
    return compared


def comparison_table(compared: Sequence[Compared]) -> str:
    """The cells as text, and below them what to know of them."""
    return "\n".join([align(*comparison_cells(compared)), *remarks(compared)])


def comparison_cells(compared: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    """precision | throughput | ratio to FP16 | latencies p50/p95 | memory | size; a GB is 10^9 bytes.

    After several rounds, the throughput's is the median round's, and beside it half the distance between the lowest
    and the highest.
    """
    latencies = ("TTFT", "between tokens", "end to end")
    several = any(len(one.rounds) > 1 for one in compared)
    reference = next((one for one in compared if one.precision == "fp16"), None) if len(compared) > 1 else None
    header = ["precision", "tokens/s", *(["±"] if several else []), *(["× fp16"] if reference else [])]
    header += [*(f"{name} ms p50/p95" for name in latencies), "memory GB", "size GB"]
    rows = []
    for one in compared:
        rates = one.tokens_per_s
        row = [one.precision, number(statistics.median(rates), 1)]
        row += [number((max(rates) - min(rates)) / 2, 1)] if several else []
        row += [_ratio(one, reference)] if reference else []
        s = one.load.summary
        row += [
            f"{number(spread.p50_ms, digits)} / {number(spread.p95_ms, digits)}"
            for spread, digits in ((s.ttft, 0), (s.itl, 1), (s.e2e, 0))
        ]
        rows.append([*row, _gigabytes(one.load.memory_bytes), _gigabytes(one.size_bytes)])
    return header, rows


def remarks(compared: Sequence[Compared]) -> list[str]:
    """Why the figures are less than they look."""
    lines = []
    for one in compared:
        failed = sum(one.load.summary.failures.values())
        lines += [f"{one.precision}: {failed} requests failed"] if failed else []
        lines += [
            f"{one.precision}: INVALID, the load generator could not keep up: {problem}"
            for problem in one.load.problems
        ]
        lines += [f"{one.precision}: cut short" for run in one.rounds if run.failure is not None]
    return lines


def _ratio(one: Compared, reference: Compared) -> str:
    """The median over rounds of the throughput's ratio to the reference's in the same round."""
    pairs = zip(one.tokens_per_s, reference.tokens_per_s, strict=False)  # the last round may be without it
    return number(statistics.median(own / its if its else float("nan") for own, its in pairs), 2)


def _warm_up(target: Target, model: str, *, chat: bool) -> None:
    prompt = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Hello"}
    for _ in target.ask(model, "", prompt, {"max_tokens": 8, "temperature": 0.0}, stream=True):
        pass


def _choose(target: Target, models: Sequence[str]) -> list[str]:
    if models:
        return [choose_model(target, model) for model in models]
    ready = target.models()
    if not ready:
        raise BadInput("the server has no model that is ready", hint="look at its log")
    return sorted(ready, key=_place)


def _ready_versions(url: str) -> dict[str, str]:
    """The highest ready version of each model, which requests without a version go to; none where none is told."""
    versions: dict[str, str] = {}
    with Client(url) as client:
        try:
            entries: Sequence[ModelEntry] = client.models()
        except ClientError:
            return {}
    for entry in entries:
        if entry.ready and int(entry.version or 0) >= int(versions.get(entry.name) or 0):
            versions[entry.name] = entry.version
    return versions


def _place(model: str) -> tuple[str, int]:
    precision = precision_of(model)
    place = PRECISIONS.index(precision) if precision in PRECISIONS else len(PRECISIONS)
    return model.removesuffix(precision), place


def _gigabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f}"
