"""The users of a locustfile. Each request fires Locust's `request` event as TTFT, ITL and E2E, named after the model.

`LlmUser` asks whatever its host is; `TritonUser` and `OpenAiUser` insist. In a closed loop a user sends its next
request when its last answer has ended. In an open loop (`--rate`, a trace, stages of a rate) a user is a dispatcher: it
sends what the plan says when the plan says it, each request in a greenlet of its own; latencies count from the plan.

Imports locust, which patches the standard library for gevent when it is imported.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

from gevent import Greenlet, GreenletExit, sleep, spawn
from gevent.pool import Group
from locust import User, task
from locust.env import Environment
from locust.exception import StopTest

from stillhouse.client import ClientError, ConnectionFailed, InvalidCall
from stillhouse.loadtest import hooks
from stillhouse.loadtest.arrivals import plan, turns
from stillhouse.loadtest.errors import WrongContent
from stillhouse.loadtest.options import sampling_of
from stillhouse.loadtest.pieces import Answer
from stillhouse.loadtest.prompts import Prompt, shuffled
from stillhouse.loadtest.samples import CUT, OK, Sample
from stillhouse.loadtest.target import OPENAI, TRITON

DEFAULT_HOST = "localhost:8001"
UNFINISHED = "Unfinished"  # an open loop waited for it after the last arrival, and it did not come
_NEVER_S = 1e7
# Users of a closed loop who begin together stay together, for a server that takes the same time for each: then all
# answers come at once, and all but the first wait for the client.
_STAGGER_S = 0.005
_PAUSE_S = 0.5  # after a request that reached no server: it is not to be made a thousand times a second


class LlmUser(User):  # type: ignore[misc]
    """Asks over whatever the host speaks: host:port gRPC, http://host:port Triton's HTTP or the OpenAI API."""

    host = DEFAULT_HOST
    protocol = ""  # found out from the host

    def on_start(self) -> None:
        run = hooks.run
        if run.problem is not None:
            # In the web page nobody reads the log: let the failure be seen there, and stop.
            _fire(self.environment, "E2E", run.model or "-", 0.0, 0, run.problem)
            raise StopTest(str(run.problem))
        options = self.environment.parsed_options
        with run.target() as target:
            target.ready()  # connects, so that the first TTFT is that of a connection that stands
        number, shares, self.zero_s = hooks.take_number(self.environment)
        self.sampling = sampling_of(options)
        self.requests = Group()
        self.drained = False
        self.last: Greenlet | None = None  # waits for the plan's last answers
        self.planned: Iterator[float] | None = None
        if run.is_open:
            self._take_share(number, shares)
            sleep(self.wait_time())
        else:
            self.prompts: Iterator[Prompt] = itertools.cycle(shuffled(run.workload.prompts, options.seed + number))
            sleep(number * _STAGGER_S % 1.0)

    def _take_share(self, number: int, shares: int) -> None:
        """This dispatcher's part of the plan; none for one that came after the others had begun."""
        run, options, times_s = hooks.run, self.environment.parsed_options, hooks.run.workload.times_s
        if number >= shares:
            self.planned, self.due_s = iter(()), self.zero_s + _NEVER_S
            return
        if times_s is not None:
            self.planned = iter(turns(times_s, number, shares))
            self.prompts = iter(turns(run.workload.prompts, number, shares))
        elif run.shape is not None:
            self.prompts = itertools.cycle(shuffled(run.workload.prompts, options.seed + number))
            self.planned = plan(
                run.shape.stages,
                options.arrivals,
                options.seed,
                share=number,
                shares=shares,
                for_ever=run.shape.for_ever,
            )
        self._plan_next()

    def wait_time(self) -> float:
        if self.planned is None:
            return 0.0
        return max(0.0, self.due_s - time.perf_counter())

    @task  # type: ignore[untyped-decorator]
    def ask(self) -> None:
        """One request: waited for in a closed loop, sent off in an open one."""
        if self.planned is None:
            self.request(next(self.prompts), None)
        else:
            self.requests.spawn(self.request, next(self.prompts), self.due_s)
            self._plan_next()

    def on_stop(self) -> None:
        """An open loop's requests have until Locust's --stop-timeout to end."""
        if not getattr(self, "requests", None):
            return
        try:
            self.drained = bool(self.environment.stop_timeout)
            self.requests.join(timeout=self.environment.stop_timeout)
        finally:
            if self.last is not None:
                self.last.kill()
            self.requests.kill()

    def request(self, prompt: Prompt, due_s: float | None) -> None:
        """One request, with its events and its sample; `due_s` is when it was planned, of time.perf_counter."""
        run, options = hooks.run, self.environment.parsed_options
        sampling = {name: value for name, value in self.sampling.items() if name not in prompt}
        late_s = 0.0 if due_s is None else max(0.0, time.perf_counter() - due_s)
        start_s, started = time.time() - late_s, time.perf_counter() - late_s
        answer = Answer()
        outcome, failure = CUT, None
        run.in_flight += 1
        try:
            with run.target() as target:
                for piece in target.ask(
                    run.model, options.model_version, prompt, sampling, stream=not options.no_stream
                ):
                    answer.add(piece)
            tokens = answer.responses if answer.counted is None else answer.counted
            _check(tokens, prompt.get("max_tokens", options.max_tokens))
            outcome = OK
        except Exception as error:  # what is no ClientError is our mistake, and as little to be hidden
            outcome, failure = type(error).__name__, error
        except GreenletExit:
            outcome = UNFINISHED if self.drained else CUT
            raise
        finally:
            # Also when the test ends in the middle of an answer: its tokens did arrive.
            run.in_flight -= 1
            passed_s = time.perf_counter() - started
            sample = self._sample(answer, outcome, start_s, passed_s, late_s)
            run.record(sample)
            if outcome != CUT:
                _fire_latencies(self.environment, sample, len(answer.text), failure)
        reached = isinstance(failure, ClientError) and not isinstance(failure, (ConnectionFailed, InvalidCall))
        if due_s is None and failure is not None and not reached:
            sleep(_PAUSE_S)

    def _sample(self, answer: Answer, outcome: str, start_s: float, passed_s: float, late_s: float) -> Sample:
        """What came of a request within `passed_s`; its latencies count from `start_s`, `late_s` before it was sent."""
        run, whole, streamed = hooks.run, outcome == OK, not self.environment.parsed_options.no_stream
        last_s = None if answer.last_s is None else late_s + answer.last_s
        answer_s = answer.clock.first_answer_s(whole=whole) if streamed else None
        recounted = run.count_tokens(answer.text) if run.count_tokens is not None else None
        counts = (answer.counted, recounted, answer.responses)
        return Sample(
            model=run.model,
            start_s=start_s,
            end_s=start_s + (last_s if last_s is not None and whole else passed_s),
            ttft_s=late_s + answer.first_s if answer.first_s is not None and streamed else None,
            last_s=last_s,
            tokens=next(count for count in counts if count is not None),
            counted_by_server=answer.counted is not None,
            outcome=outcome,
            answer_s=None if answer_s is None else late_s + answer_s,
            late_s=late_s,
            prompt_tokens=answer.prompt_tokens,
            recounted=recounted,
        )

    def _plan_next(self) -> None:
        due_s = next(self.planned, None) if self.planned is not None else None
        self.due_s = self.zero_s + (_NEVER_S if due_s is None else due_s)
        if due_s is None and self.last is None:
            self.last = spawn(self._come_to_end)

    def _come_to_end(self) -> None:
        """After the plan's end nothing is due; what was sent goes on."""
        self.requests.join()
        hooks.come_to_end(self.environment)


class TritonUser(LlmUser):
    """Asks a Triton server: host:port or grpc://host:port gRPC, http://host:port HTTP."""

    protocol = TRITON


class OpenAiUser(LlmUser):
    """Asks an OpenAI-compatible API: http://host:port or http://host:port/v1."""

    protocol = OPENAI
    host = "http://localhost:9000"


def _check(tokens: int, most: int) -> None:
    if tokens < 1:
        raise WrongContent("the answer ended well, but has no token")
    if tokens > most:
        raise WrongContent(f"the answer has {tokens} tokens, at most {most} were asked for")


def _fire_latencies(environment: Environment, sample: Sample, letters: int, failure: Exception | None) -> None:
    if failure is None and sample.outcome == OK:
        if sample.ttft_s is not None:
            _fire(environment, "TTFT", sample.model, sample.ttft_s * 1000, 0, None)
        if sample.answer_s is not None and sample.answer_s != sample.ttft_s:
            _fire(environment, "ANSWER", sample.model, sample.answer_s * 1000, 0, None)
        if sample.itl_s is not None:
            _fire(environment, "ITL", sample.model, sample.itl_s * 1000, 0, None)
    elif failure is None:
        failure = ClientError("the answer was not there when the test was over")
    _fire(environment, "E2E", sample.model, sample.e2e_s * 1000, letters, failure)


def _fire(environment: Environment, kind: str, name: str, time_ms: float, length: int, error: Any) -> None:
    environment.events.request.fire(
        request_type=kind,
        name=name,
        response_time=time_ms,
        response_length=length,
        exception=error,
        context={},
    )
