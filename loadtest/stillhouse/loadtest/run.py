"""A Locust run in a process of its own (Locust patches the standard library of the process that imports it)."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stillhouse.client.address import parse_url
from stillhouse.loadtest.errors import BadInput, RunFailed
from stillhouse.loadtest.load import Load, environment_facts, locust_arguments
from stillhouse.loadtest.server_metrics import QueueTime, gauge_of, is_gateways, queue_of, read_page
from stillhouse.loadtest.tally import Summary, Tally, without_nan
from stillhouse.loadtest.target import choose_model, open_target, resolve

_START_AND_END_S = 60.0  # what Locust may need beyond the run itself
_HEARD_S = 8.0  # what it may need to end, once it was told to
_ASK_S = 1.0  # how often the server's metrics and Locust's progress are read

_BULK = ("samples", "sample_fields", "tally", "curves")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class LoadResult:
    """What one run measured."""

    model: str
    users: int
    summary: Summary
    memory_bytes: int | None  # the largest that the server reported; None where it reports none
    queue: QueueTime | None = None  # the server's own, of the requests during the run
    load: Load = field(default_factory=Load)
    host: str = ""
    details: dict[str, Any] = field(default_factory=dict)  # what Locust's process wrote: curves, client, samples
    hint: str = ""  # where figures are that are missing

    @property
    def problems(self) -> list[str]:
        """Why the figures cannot be believed; empty where they can."""
        return list(self.details.get("client", {}).get("problems", []))

    @property
    def ended_early(self) -> str:
        return str(self.details.get("ended_early", ""))

    @property
    def interrupted(self) -> bool:
        return bool(self.details.get("interrupted"))

    @property
    def failure(self) -> KeyboardInterrupt | RunFailed | None:
        """Why it did not last as long as it was to; None where it did. Its figures are of what came before."""
        if self.interrupted:
            return KeyboardInterrupt()
        return RunFailed(self.ended_early, hint="the figures are of what came before") if self.ended_early else None

    def to_json(self, *, whole: bool = True) -> dict[str, Any]:
        """Everything; not `whole`: without the requests and the distributions."""
        queue = self.queue
        server = {
            "memory_bytes": self.memory_bytes,
            "queue_mean_ms": queue.mean_ms if queue else None,
            "queue_p95_ms": queue.percentile_ms(95) if queue else None,
        }
        value: dict[str, Any] = without_nan(
            {
                "model": self.model,
                "users": self.users,
                "memory_bytes": self.memory_bytes,
                "summary": self.summary.to_json(),
                "server": server,
                "settings": {"host": self.host, **self.load.to_json()},
                "environment": environment_facts(),
                **{
                    name: value
                    for name, value in self.details.items()
                    if name != "summaries" and (whole or name not in _BULK)
                },
            }
        )
        return value


def default_metrics_url(host: str, protocol: str = "") -> str:
    """The metrics page of Triton at its default port; of an OpenAI API at /metrics beside its /v1."""
    address = parse_url(host)
    if protocol == "openai" or (not address.is_grpc and address.path.endswith("/v1")):
        return address.base_url.removesuffix("/v1") + "/metrics"
    return f"http://{address.host}:8002/metrics"


def run_locust(
    host: str,
    model: str = "",
    load: Load | None = None,
    *,
    metrics_url: str | None = None,
    api_key: str = "",
    progress: Progress | None = None,
) -> LoadResult:
    """Drives `model` (the server's int4 where it is empty) at `host` as `load` says.

    A server that goes away and an interrupt end the run; what came before is in the result, and why in its `failure`.
    Raises BadInput or ClientError where it cannot be tested at all, RunFailed where Locust gave no result.
    """
    load = (load or Load()).checked()
    api_key = api_key or os.environ.get("OPENAI_API_KEY", "")
    load, base_url, model = _ask_first(host, model, load, api_key)
    with tempfile.TemporaryDirectory(prefix="stillhouse-loadtest-") as name:
        folder = Path(name)
        command = [sys.executable, "-m", "locust", *locust_arguments(base_url, model, load, folder)]
        metrics_url = metrics_url or default_metrics_url(host, load.protocol)
        # The key is for who is asked, not for whoever else has the metrics.
        metrics_key = api_key if parse_url(metrics_url).authority == parse_url(host).authority else ""
        watch = _Watch(metrics_url, metrics_key, model, folder, load, progress)
        interrupted = _run(command, folder, load, api_key, watch)
        if interrupted and not (folder / "result.json").exists():
            raise KeyboardInterrupt  # before the first request
        result = _read_result(folder)
    tallies = [Tally.from_json(value) for value in result.pop("tallies")]
    if len(tallies) != 1:
        raise RunFailed(f"a run measures one model, got {len(tallies)}", hint=result.get("ended_early") or None)
    summary = Summary.from_json(result["summaries"][0])
    result |= {"tally": tallies[0].to_json(), "interrupted": interrupted}
    hint = watch.hint(host)
    return LoadResult(summary.model, load.users, summary, watch.memory_bytes, watch.queue, load, host, result, hint)


def _ask_first(host: str, model: str, load: Load, api_key: str) -> tuple[Load, str, str]:
    """Finds out protocol, URL and model, so that what cannot be tested is known before a process is started."""
    protocol, base_url = resolve(host, load.protocol)
    limits = {"timeout_s": load.timeout_s, "token_timeout_s": load.token_timeout_s}
    target = open_target(base_url, protocol, api_key=api_key, **limits)
    try:
        return replace(load, protocol=protocol), base_url, choose_model(target, model)
    finally:
        target.close()


def merged(results: Sequence[LoadResult]) -> LoadResult:
    """Several runs of the same load as one: latencies over all requests, rates over the time of the runs alone.

    It is as valid as the least valid of them.
    """
    first = results[0]
    if len(results) == 1:
        return first
    tally = Tally.from_json(first.details["tally"])
    for result in results[1:]:
        tally.merge(Tally.from_json(result.details["tally"]))
    duration_s = sum(result.summary.duration_s for result in results)
    summary = replace(
        tally.summary(),
        duration_s=duration_s,
        tokens_per_s=tally.tokens / duration_s if duration_s else 0.0,
        requests_per_s=tally.requests / duration_s if duration_s else 0.0,
    )
    memory_bytes = max((result.memory_bytes for result in results if result.memory_bytes is not None), default=None)
    queues = [result.queue for result in results if result.queue is not None]
    problems = list(dict.fromkeys(problem for result in results for problem in result.problems))
    details = {
        "protocol": first.details.get("protocol"),
        "client": {"valid": not problems, "problems": problems},
        "left_out": first.details.get("left_out", 0),
        "curves": {first.model: tally.curves()},
        "tally": tally.to_json(),
    }
    queue = functools.reduce(QueueTime.plus, queues) if queues else None
    return replace(first, summary=summary, memory_bytes=memory_bytes, queue=queue, details=details)


class _Watch:
    """Reads the server's metrics page and Locust's progress while the run goes on."""

    def __init__(
        self, metrics_url: str, api_key: str, model: str, folder: Path, load: Load, progress: Progress | None
    ) -> None:
        self.memory_bytes: int | None = None
        self.queue: QueueTime | None = None
        self._before: QueueTime | None = None
        self._at_gateway = False
        self._metrics_url, self._api_key, self._model = metrics_url, api_key, model
        self._folder, self._load, self._progress = folder, load, progress

    def look(self) -> None:
        page = read_page(self._metrics_url, self._api_key)
        if page is not None:
            self._at_gateway = is_gateways(page)
            now_bytes, queue = gauge_of(page, self._model), queue_of(page, self._model)
            self.memory_bytes = max(filter(None, (self.memory_bytes, now_bytes)), default=None)
            if queue is not None and self._before is None:
                self._before = queue
            elif queue is not None and self._before is not None:
                self.queue = queue.since(self._before)
        if self._progress:
            try:
                told = json.loads((self._folder / "progress.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return  # not begun yet, or half written
            self._progress(
                f"  {told['elapsed_s']:.0f} of {self._load.duration_s:.0f} s: {told['answers']} answers, "
                f"{told['failed']} failed, {told['tokens']} tokens"
            )

    def hint(self, host: str) -> str:
        """Where the figures are that the page lacked; "" where it had them, or nobody can say."""
        if not self._at_gateway or self.memory_bytes is not None:
            return ""
        page = f"http://{parse_url(host).host}:8002/metrics"
        return f"memory and queue time are on Triton's own metrics page, not the gateway's: add --metrics-url {page}"


def _run(command: list[str], folder: Path, load: Load, api_key: str, watch: _Watch) -> bool:
    """Runs Locust to its end. True where an interrupt ended the test: its figures are kept."""
    # Neither a locust.conf of the current folder nor Locust's variables shall change the run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST")}
    if api_key:
        environment["OPENAI_API_KEY"] = api_key  # not an argument: those can be read by every user of the machine
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, env=environment
        )
    ends_s = time.monotonic() + load.duration_s + load.drain_s + _START_AND_END_S
    interrupted = False
    try:
        try:
            ended = _has_ended(process, watch, ends_s)
        except KeyboardInterrupt:
            # A terminal has told Locust too: it ends its test and writes what came.
            interrupted = True
            ended = _has_ended(process, watch, time.monotonic() + load.drain_s + _HEARD_S)
            if not ended:
                process.terminate()  # nobody told it
                ended = _has_ended(process, watch, time.monotonic() + load.drain_s + _HEARD_S)
        if not ended:
            raise RunFailed(f"Locust did not end within {_START_AND_END_S:g} s after its run time")
        watch.look()
        return interrupted
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _has_ended(process: subprocess.Popen[bytes], watch: _Watch, until_s: float) -> bool:
    """Waits for it, until `until_s` of time.monotonic at most."""
    while process.poll() is None and time.monotonic() < until_s:
        watch.look()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_ASK_S)
    return process.poll() is not None


def _read_result(folder: Path) -> dict[str, Any]:
    path = folder / "result.json"
    if not path.exists():
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
        raise RunFailed(f"Locust gave no result: {said.removeprefix('error: ') or 'it said nothing'}")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "error" in result:
        raise BadInput(result["error"], hint=result["hint"])
    return result
