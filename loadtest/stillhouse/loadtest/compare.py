"""The same load on one model after another, and the table that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.client import Client, ModelEntry
from stillhouse.loadtest.errors import BadInput
from stillhouse.loadtest.memory import version_size_bytes
from stillhouse.loadtest.report import align, number
from stillhouse.loadtest.run import LoadResult, run_locust

PRECISIONS = ("fp32", "fp16", "int8", "int4")


@dataclass(frozen=True)
class Compared:
    """One line of the table."""

    precision: str  # or the model's name, where it ends in none
    load: LoadResult
    size_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return {"precision": self.precision, "size_bytes": self.size_bytes, **self.load.to_json()}


def precision_of(model: str) -> str:
    ending = model.rsplit("-", 1)[-1]
    return ending if ending in PRECISIONS else model


def compare_models(
    url: str,
    models: Sequence[str] = (),
    *,
    users: int = 4,
    duration_s: float = 15.0,
    max_tokens: int = 64,
    prompts: Path | None = None,
    seed: int = 0,
    metrics_url: str | None = None,
    repository: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Compared]:
    """Drives the models (all that are ready, where none is named) one after the other, `duration_s` each.

    Answers have `max_tokens` tokens each, greedily, from the same prompts in the same order. `repository` is the
    server's, where it is on this machine, for the sizes. Raises ClientError or LoadtestError.
    """
    with Client(url) as client:
        versions = _ready_versions(client.models())
        missing = [model for model in models if model not in versions]
        if missing:
            raise BadInput(f"no model {missing[0]!r} on {client.address.authority}", hint=_ready_hint(versions))
        chosen = list(models) or sorted(versions, key=_place)
        if not chosen:
            raise BadInput(f"{client.address.authority} has no model that is ready", hint="look at the server's log")
        compared = []
        for model in chosen:
            if progress:
                progress(f"{model}: {users} users, {duration_s:g} s")
            # The first request of a process pays for what is done once; no user should.
            client.generate(model, "Hello", max_tokens=8, temperature=0.0)
            load = run_locust(
                url,
                model,
                users=users,
                duration_s=duration_s,
                max_tokens=max_tokens,
                prompts=prompts,
                seed=seed,
                metrics_url=metrics_url,
            )
            size_bytes = version_size_bytes(repository, model, versions[model]) if repository else None
            compared.append(Compared(precision_of(model), load, size_bytes))
    return compared


def comparison_table(compared: Sequence[Compared]) -> str:
    """precision | throughput | latencies p50/p95 | memory | size; a GB is 10^9 bytes."""
    latencies = ("TTFT", "between tokens", "end to end")
    header = ["precision", "tokens/s", *(f"{name} ms p50/p95" for name in latencies), "memory GB", "size GB"]
    rows = []
    for one in compared:
        s = one.load.summary
        row = [one.precision, number(s.tokens_per_s, 1)]
        row += [
            f"{number(spread.p50_ms, digits)} / {number(spread.p95_ms, digits)}"
            for spread, digits in ((s.ttft, 0), (s.itl, 1), (s.e2e, 0))
        ]
        rows.append([*row, _gigabytes(one.load.memory_bytes), _gigabytes(one.size_bytes)])
    lines = [align(header, rows)]
    lines += [
        f"{one.precision}: {sum(one.load.summary.failures.values())} requests failed"
        for one in compared
        if one.load.summary.failures
    ]
    return "\n".join(lines)


def _ready_versions(entries: Sequence[ModelEntry]) -> dict[str, str]:
    """The highest ready version of each model: the one that requests without a version go to."""
    versions: dict[str, str] = {}
    for entry in entries:
        if entry.ready and int(entry.version or 0) >= int(versions.get(entry.name) or 0):
            versions[entry.name] = entry.version
    return versions


def _ready_hint(versions: dict[str, str]) -> str:
    return f"ready there: {', '.join(sorted(versions)) or 'none'}"


def _place(model: str) -> tuple[str, int]:
    precision = precision_of(model)
    place = PRECISIONS.index(precision) if precision in PRECISIONS else len(PRECISIONS)
    return model.removesuffix(precision), place


def _gigabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f}"
