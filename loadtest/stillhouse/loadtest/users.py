"""What a locustfile needs: the user, its options, and the events that make Locust show a language model's latencies.

Every request fires Locust's `request` event as TTFT, ITL and E2E, named after the model; a request that failed fires
E2E alone, with its error. Samples are kept beside, for tokens/s and percentiles, and go to the master with the workers'
reports.

Imports locust (which patches the standard library for gevent when it is imported), and then lets grpc know of gevent:
its waiting gives way to the other users.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from locust import User, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopTest
from locust.runners import MasterRunner, WorkerRunner

from stillhouse.client import Client, ClientError, Token
from stillhouse.loadtest.choose import choose_model
from stillhouse.loadtest.errors import LoadtestError
from stillhouse.loadtest.prompts import Prompt, load_prompts, shuffled
from stillhouse.loadtest.report import token_table, write_csv, write_json
from stillhouse.loadtest.samples import Sample, summarize

logger = logging.getLogger(__name__)

DEFAULT_HOST = "localhost:8001"


# Users that share a client, and so an HTTP/2 connection over gRPC: a channel costs a thread, and some servers and
# proxies let 128 streams at most into one connection.
USERS_PER_CLIENT = 100


def _let_grpc_know_of_gevent() -> None:
    import grpc.experimental.gevent
    from gevent import get_hub  # type: ignore[import-untyped]

    grpc.experimental.gevent.init_gevent()
    # grpc waits in a thread of this pool for every channel that has a stream open. With the usual ten threads, users
    # beyond ten channels wait for one another.
    get_hub().threadpool.maxsize = 1000


_let_grpc_know_of_gevent()


@dataclass
class Run:
    """One test in this process: what is asked, and what came of it."""

    model: str = ""
    prompts: list[Prompt] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    users: Iterator[int] = field(default_factory=itertools.count)
    clients: list[Client] = field(default_factory=list)
    problem: LoadtestError | ClientError | None = None


_run = Run()


class TritonUser(User):  # type: ignore[misc]
    """Sends one streamed request after another; the host says over what: host:port gRPC, http://host:port HTTP."""

    host = DEFAULT_HOST
    wait_time = constant(0)

    def on_start(self) -> None:
        if _run.problem is not None:
            # In the web page nobody reads the log: let the failure be seen there, and stop.
            _fire(self.environment, "E2E", _run.model or "-", 0.0, 0, _run.problem)
            raise StopTest(str(_run.problem))
        options = self.environment.parsed_options
        number = next(_run.users)
        if number % USERS_PER_CLIENT == 0:
            _run.clients.append(Client(_host(self.environment), token_timeout_s=options.token_timeout))
        self.client = _run.clients[number // USERS_PER_CLIENT]
        self.prompts = itertools.cycle(shuffled(_run.prompts, options.seed + number))
        self.sampling = _sampling(options)
        self.client.ready()  # connects, so that the first TTFT is that of a connection that stands

    @task  # type: ignore[untyped-decorator]
    def ask(self) -> None:
        """One request, with its events and its sample."""
        prompt = next(self.prompts)
        version = self.environment.parsed_options.model_version or None
        start_s, started = time.time(), time.perf_counter()
        ttft_s: float | None = None
        last: Token | None = None
        letters, responses, outcome = 0, 0, "cut"
        try:
            for token in self.client.stream(_run.model, version=version, **prompt, **self.sampling):
                if ttft_s is None:
                    ttft_s = token.time_s
                letters += len(token.text)
                responses += 1
                last = token
            outcome = "ok"
        except ClientError as error:
            outcome = type(error).__name__
            e2e_ms = (time.perf_counter() - started) * 1000
            _fire(self.environment, "E2E", _run.model, e2e_ms, letters, error)
        finally:
            # Also when the test ends in the middle of an answer: its tokens did arrive.
            last_s = None if last is None else last.time_s
            e2e_s = last_s if last_s is not None and outcome == "ok" else time.perf_counter() - started
            counted = None if last is None else last.num_output_tokens
            tokens = responses if counted is None else counted
            sample = Sample(
                model=_run.model,
                start_s=start_s,
                end_s=start_s + e2e_s,
                ttft_s=ttft_s,
                last_s=last_s,
                tokens=tokens,
                counted_by_server=counted is not None,
                outcome=outcome,
            )
            _run.samples.append(sample)
        if outcome == "ok":
            _fire_latencies(self.environment, sample, letters)


def _fire_latencies(environment: Environment, sample: Sample, letters: int) -> None:
    if sample.ttft_s is not None:
        _fire(environment, "TTFT", sample.model, sample.ttft_s * 1000, 0, None)
    if sample.itl_s is not None:
        _fire(environment, "ITL", sample.model, sample.itl_s * 1000, 0, None)
    _fire(environment, "E2E", sample.model, (sample.end_s - sample.start_s) * 1000, letters, None)


def _fire(environment: Environment, kind: str, name: str, time_ms: float, length: int, error: Exception | None) -> None:
    environment.events.request.fire(
        request_type=kind,
        name=name,
        response_time=time_ms,
        response_length=length,
        exception=error,
        context={},
    )


def _host(environment: Environment) -> str:
    return str(environment.host or TritonUser.host)


def _sampling(options: Namespace) -> dict[str, Any]:
    sampling: dict[str, Any] = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    if options.temperature > 0:
        sampling["seed"] = options.seed
    if options.ignore_eos:
        sampling["ignore_eos"] = True
    return sampling


def add_options(parser: LocustArgumentParser) -> None:
    """Our own options; Locust shows them in its web form too."""
    add = parser.add_argument
    add("--model", default="", help="Model to ask (default: the server's first model ending in -int4, else its first)")
    add("--model-version", default="", help="Version of the model (default: the live one)")
    add("--prompts", default="", metavar="FILE", help='JSONL of {"prompt": ...} or {"messages": [...]} (default: ours)')
    add("--max-tokens", type=int, default=64, help="Longest answer, in tokens (default: 64)")
    add("--ignore-eos", action="store_true", help="Let every answer have exactly --max-tokens tokens")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    add("--seed", type=int, default=0, help="Seed of the prompts' order, and of the sampling (default: 0)")
    add("--token-timeout", type=float, default=30.0, help="Seconds without a next token that fail a request")
    add("--result", default="", metavar="FILE", include_in_web_ui=False, help="Write the figures as JSON")


def check_before_start(environment: Environment, **_: Any) -> None:
    """Without the web page, what cannot be tested ends the process with one line and a hint."""
    options = environment.parsed_options
    if options is None or options.worker or not options.headless:
        return
    _prepare(environment)
    if _run.problem is not None:
        if options.result:
            problem = {"error": str(_run.problem), "hint": _run.problem.hint}
            write_json(Path(options.result), problem)
        sys.exit(1)


def begin(environment: Environment, **_: Any) -> None:
    _run.samples.clear()
    _run.users = itertools.count()
    while _run.clients:
        _run.clients.pop().close()
    if not isinstance(environment.runner, MasterRunner):
        _prepare(environment)


def _prepare(environment: Environment) -> None:
    options = environment.parsed_options
    _run.problem = None
    try:
        _run.prompts = load_prompts(Path(options.prompts) if options.prompts else None)
        with Client(_host(environment)) as client:
            _run.model = choose_model(client, options.model)
    except (LoadtestError, ClientError) as problem:
        _run.problem = problem
        print(f"error: {problem}", file=sys.stderr)
        if problem.hint:
            print(f"hint: {problem.hint}", file=sys.stderr)


def send_samples(client_id: str, data: dict[str, Any]) -> None:  # noqa: ARG001
    data["stillhouse_samples"] = [asdict(sample) for sample in _run.samples]
    _run.samples.clear()


def take_samples(client_id: str, data: dict[str, Any]) -> None:  # noqa: ARG001
    _run.samples.extend(Sample(**sample) for sample in data.get("stillhouse_samples", ()))


def end(environment: Environment, **_: Any) -> None:
    if isinstance(environment.runner, WorkerRunner):
        return
    if isinstance(environment.runner, MasterRunner):
        if environment.web_ui is not None:
            threading.Timer(_LAST_REPORTS_S, _report, [environment]).start()
        return
    time.sleep(_LAST_TASKS_S)
    _report(environment)


# In seconds: workers report 3 s, and users that were stopped still have to write their last sample.
_LAST_REPORTS_S = 4.0
_LAST_TASKS_S = 0.05


def quitting(environment: Environment, **_: Any) -> None:
    """A master without the web page has its workers' last samples only now."""
    if isinstance(environment.runner, MasterRunner) and environment.web_ui is None:
        _report(environment)


def _report(environment: Environment) -> None:
    options = environment.parsed_options
    summaries = summarize(_run.samples)
    if not summaries:
        logger.warning("no request was made: no figures")
        return
    print(f"\n{token_table(summaries)}\n", flush=True)
    if options.csv_prefix:
        write_csv(Path(f"{options.csv_prefix}_tokens.csv"), summaries)
    if options.result:
        write_json(Path(options.result), {"summaries": [summary.to_json() for summary in summaries]})


events.init_command_line_parser.add_listener(add_options)
events.init.add_listener(check_before_start)
events.test_start.add_listener(begin)
events.report_to_master.add_listener(send_samples)
events.worker_report.add_listener(take_samples)
events.test_stop.add_listener(end)
events.quitting.add_listener(quitting)
