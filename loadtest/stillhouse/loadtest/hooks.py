"""What happens around the users: options, preparation, numbering, workers' reports, the result. All by Locust's events.

Imported once a process, by the users; `run` is the test of this process.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

import gevent
from gevent.event import AsyncResult
from gevent.queue import Queue
from locust import events
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from stillhouse.client import ClientError
from stillhouse.loadtest.errors import BadInput, LoadtestError
from stillhouse.loadtest.gathering import GATHER_S, Gathering
from stillhouse.loadtest.options import add_options, api_key_of, counter_of, shape_of, slo_of, workload_of
from stillhouse.loadtest.recording import Run
from stillhouse.loadtest.report import token_table, write_csv, write_json
from stillhouse.loadtest.tally import Summary
from stillhouse.loadtest.target import choose_model, resolve
from stillhouse.loadtest.user_stages import UserStages

logger = logging.getLogger(__name__)

run = Run()

_LEAD_S = 0.5  # what the master's answer to a worker may need
_LAST_TASKS_S = 0.05  # users that were stopped still have to write their last sample
_USERS = "stillhouse.loadtest.users"
_REPORT, _NUMBER, _AT_END = "stillhouse_report", "stillhouse_number", "stillhouse_at_end"
_GONE, _STOP = "stillhouse_gone", "stillhouse_stop"
_REPORTS_S = 5.0  # beyond --stop-timeout, for the workers' last reports


_gathering = Gathering()
_answers: Queue[tuple[int, int, float]] = Queue()  # of the master to this worker's users


def take_number(environment: Environment) -> tuple[int, int, float]:
    """A user's number in the whole test, the plan's shares, and its zero, of this process's time.perf_counter.

    Waits for the other dispatchers of an open loop.
    """
    if isinstance(environment.runner, WorkerRunner):
        environment.runner.send_message(_NUMBER)
        number, shares, zero_s = _answers.get(timeout=3 * GATHER_S)
    else:
        came: AsyncResult[tuple[int, int, float]] = AsyncResult()
        _gathering.come(lambda *answer: came.set(answer))
        number, shares, zero_s = came.get()
    return number, shares, time.perf_counter() + (zero_s - time.time())


def come_to_end(environment: Environment) -> None:
    """A dispatcher has sent all of its plan; when all have, the test is ended."""
    if isinstance(environment.runner, WorkerRunner):
        environment.runner.send_message(_AT_END)
    else:
        _gathering.come_to_end()


def begin_process(environment: Environment, **_: Any) -> None:
    """Once a process. Without the web page, what cannot be tested ends it with one line and a hint."""
    _choose_user_class(environment)
    runner = environment.runner
    if isinstance(runner, MasterRunner):
        runner.register_message(_NUMBER, _answer_number)
        runner.register_message(_AT_END, lambda environment, msg: _gathering.come_to_end())  # noqa: ARG005
        runner.register_message(_REPORT, _take_last_report)
        runner.register_message(_GONE, lambda environment, msg: _end_early(environment, msg.data["why"]))
    elif isinstance(runner, WorkerRunner):
        _leave_the_first_interrupt_to_the_master(environment)
        runner.register_message(_STOP, lambda environment, msg: environment.runner.stop(), concurrent=True)  # noqa: ARG005
        runner.register_message(_NUMBER, lambda environment, msg: _answers.put(msg.data["number"]))  # noqa: ARG005
    gevent.spawn(run.loop.run)
    gevent.spawn(_watch, environment)
    options = environment.parsed_options
    if options is None or options.worker or not options.headless:
        return
    _prepare(environment)
    if run.problem is not None:
        if options.result:
            write_json(Path(options.result), {"error": str(run.problem), "hint": run.problem.hint})
        sys.exit(1)
    if run.shape is not None and run.shape.in_users:
        environment.shape_class = UserStages(run.shape.stages)
        environment.shape_class.runner = runner


def _leave_the_first_interrupt_to_the_master(environment: Environment) -> None:
    """A terminal tells all of --processes at once, and of a worker that ends by itself no last report is taken."""
    options = environment.parsed_options
    if options is not None and options.processes and "--worker" not in sys.argv:
        signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.default_int_handler))


def begin_test(environment: Environment, **_: Any) -> None:
    run.close()
    _prepare(environment)
    _forget()
    while not _answers.empty():
        _answers.get_nowait()  # to a user of the last test, who was gone
    dispatchers = (environment.parsed_options.num_users or 1) if run.is_open else 0
    lead_s = _LEAD_S if isinstance(environment.runner, MasterRunner) else 0.0
    _gathering.restart(dispatchers, lead_s, lambda: _end(environment))


def end_test(environment: Environment, **_: Any) -> None:
    time.sleep(_LAST_TASKS_S)
    runner = environment.runner
    if isinstance(runner, WorkerRunner):
        runner.send_message(_REPORT, run.hand_over())  # before Locust tells the master that this worker has stopped
        return
    if isinstance(runner, MasterRunner):
        _await_last_reports(environment)
    else:
        run.clients["local"] = run.loop.state()
    _report(environment)


def _await_last_reports(environment: Environment) -> None:
    """Without the web page, Locust tells its workers to stop after this event, and waits half a second for them."""
    runner = environment.runner
    runner.send_message(_STOP)
    ends_s = time.monotonic() + environment.stop_timeout + _REPORTS_S
    while set(runner.clients) - run.reported and time.monotonic() < ends_s:
        time.sleep(0.05)


def _take_last_report(environment: Environment, msg: Any) -> None:  # noqa: ARG001
    run.take_over(msg.node_id, msg.data)
    run.reported.add(msg.node_id)


def send_samples(client_id: str, data: dict[str, Any]) -> None:  # noqa: ARG001
    data["stillhouse"] = run.hand_over()


def take_samples(client_id: str, data: dict[str, Any]) -> None:
    if "stillhouse" in data:
        run.take_over(client_id, data["stillhouse"])


def _answer_number(environment: Environment, msg: Any) -> None:
    runner, worker = environment.runner, msg.node_id
    _gathering.come(lambda *answer: runner.send_message(_NUMBER, {"number": answer}, worker))


def _choose_user_class(environment: Environment) -> None:
    """Unless classes were named: a locustfile's own, or of ours the one that asks whatever the host is."""
    options = environment.parsed_options
    if options is None or options.user_classes or options.class_picker:
        return
    own = [one for one in environment.user_classes if one.__module__ != _USERS]
    environment.user_classes[:] = own or [one for one in environment.user_classes if not one.protocol]


def _forget() -> None:
    run.samples, run.tallies, run.clients = type(run.samples)(), {}, {}
    run.ended_early, run.in_flight, run.begun_s = "", 0, time.time()
    run.reported.clear()
    run.loop.restart()
    run.server = type(run.server)()


def _prepare(environment: Environment) -> None:
    options = environment.parsed_options
    run.problem = None
    run.api_key, run.timeout_s, run.token_timeout_s = api_key_of(options), options.timeout, options.token_timeout
    try:
        run.host, protocol = _whom_to_ask(environment)
        run.workload, run.slo, run.shape = workload_of(options), slo_of(options), shape_of(options)
        run.count_tokens = counter_of(options)
        if environment.web_ui is not None and run.shape is not None and run.shape.in_users:
            raise BadInput("stages of users are for runs without the web page", hint="add --headless")
        if isinstance(environment.runner, MasterRunner) and environment.web_ui is not None:
            return  # its workers ask; whether a server is there is for them to say
        run.protocol, run.host = resolve(run.host, protocol)
        target = run.new_target()
        try:
            run.model = choose_model(target, options.model)
            target.prepare(run.model, options.model_version)
        finally:
            target.close()
    except (LoadtestError, ClientError) as problem:
        run.problem = problem
        print(f"error: {problem}", file=sys.stderr)
        if problem.hint:
            print(f"hint: {problem.hint}", file=sys.stderr)


def _whom_to_ask(environment: Environment) -> tuple[str, str]:
    """The host and the protocol of all user classes of ours ("" to find out). Raises BadInput where they differ."""
    ours = [one for one in environment.user_classes if hasattr(one, "protocol")]
    asked = {(str(environment.host or one.host), one.protocol) for one in ours}
    if len(asked) != 1:
        said = ", ".join(sorted(f"{host} ({protocol or 'found out'})" for host, protocol in asked)) or "none"
        raise BadInput(f"a test asks one server over one protocol, got {said}", hint="name one user class, or --host")
    return asked.pop()


def _watch(environment: Environment) -> None:
    """Tells how far the test is, and ends it when its server is gone."""
    while True:
        time.sleep(0.5)
        runner, options = environment.runner, environment.parsed_options
        if options is not None and options.progress and not isinstance(runner, WorkerRunner):
            write_json(Path(options.progress), run.progress())
        if not run.server.suspects() or run.ended_early:
            continue
        target = run.new_target()
        gone = not target.ready()
        target.close()
        if not gone:
            run.server = type(run.server)()
            continue
        why = f"the server at {run.host} stopped answering {time.time() - run.begun_s:.0f} s into the test"
        if isinstance(runner, WorkerRunner):
            run.ended_early = why
            runner.send_message(_GONE, {"why": why})
        else:
            _end_early(environment, why)


def _end_early(environment: Environment, why: str) -> None:
    if run.ended_early:
        return
    run.ended_early = why
    print(f"error: {why}; the figures are of what came before", file=sys.stderr)
    _end(environment)


def _end(environment: Environment) -> None:
    gevent.spawn(environment.runner.quit if environment.web_ui is None else environment.runner.stop)


def _report(environment: Environment) -> None:
    options = environment.parsed_options
    result = run.result()
    # What the stages count from. Users that change in number are counted from the test's begin by Locust.
    result["zero_s"] = _gathering.zero_s if run.is_open else run.begun_s
    summaries = [Summary.from_json(value) for value in result["summaries"]]
    if not summaries:
        logger.warning("no request was made: no figures")
        return
    print(f"\n{token_table(summaries)}\n", flush=True)
    for problem in result["client"]["problems"]:
        print(f"INVALID: the load generator could not keep up: {problem}", flush=True)
    if run.workload.left_out:
        print(f"left out: {run.workload.left_out} conversations without a question", flush=True)
    if options.csv_prefix:
        write_csv(Path(f"{options.csv_prefix}_tokens.csv"), summaries)
    if options.result:
        write_json(Path(options.result), result)


events.init_command_line_parser.add_listener(add_options)
events.init.add_listener(begin_process)
events.test_start.add_listener(begin_test)
events.report_to_master.add_listener(send_samples)
events.worker_report.add_listener(take_samples)
events.test_stop.add_listener(end_test)
