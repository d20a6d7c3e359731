"""Looks after the models' processes: Triton neither restarts one that has died, nor ends its streams, nor says so.

Now and then Triton itself dies with one: both use the same locks in shared memory, and one that is killed with a lock
in its hand is an exception that Triton does not catch (triton-inference-server/server#8882). Then all is started again.

Nor does Triton 2.51 ever end a load whose process has died: every other load of that model waits behind it, while the
versions that are loaded and the other models go on answering. Only another server loads that model again.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from stillhouse.client import ClientError
from stillhouse.engine.directory import held
from stillhouse.engine.errors import StillhouseError, VersionError
from stillhouse.engine.policy import live_versions, set_live_versions
from stillhouse.serve.control import TritonControl
from stillhouse.serve.errors import LoadDied, ServeError
from stillhouse.serve.launcher import ServeOptions, Server, start_server
from stillhouse.serve.processes import ModelProcess, runs
from stillhouse.serve.under_way import told_under_way

log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 30.0
_SOUND_AFTER_S = 10.0
_QUIET_S = 10.0


class Told(Protocol):
    """Who is told of deaths and returns: the gateway's side of the models."""

    def fail(self, name: str, version: int, reason: str) -> None: ...

    def suspect(self, name: str) -> None: ...


class Backoff:
    """How long to wait before a repair: not at all, unless the one before did not help; then longer each time."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._sound_at_s = -math.inf
        self._wait_s = 0.0

    def next_s(self) -> float:
        """0; 1, 2, 4 … at most 30 s where the repair before is not over, or has been for less than 10 s."""
        again = self._clock_s() < self._sound_at_s
        self._wait_s = min(_LONGEST_WAIT_S, max(1.0, 2 * self._wait_s)) if again else 0.0
        self._sound_at_s = math.inf
        if self._wait_s:
            log.warning("it is not long since the last repair: the next is in %g s", self._wait_s)
        return self._wait_s

    def over(self) -> None:
        """All answers again."""
        self._sound_at_s = self._clock_s() + _SOUND_AFTER_S


class Supervisor:
    """Keeps the models of a server answering; `look()` is called several times a second. `server` is the present one.

    A model whose live version has died is down: it is unloaded and loaded, or the server is started again where that
    cannot be, or where Triton would leave the clients of streams without an end. Whatever dies beside a live version
    must not touch it: a version that was kept is loaded again alone, one that was being loaded is taken out of the
    policy, which is what `promote` looks at while it waits.
    """

    def __init__(
        self, server: Server, options: ServeOptions, told: Told | None, stop: threading.Event, backoff: Backoff
    ) -> None:
        self.server = server
        self._options, self._told, self._stop, self._backoff = options, told, stop, backoff
        self._names = [model.name for model in server.models]
        self._due_s: float | None = None  # when those that are down are repaired
        self._quiet_since_s = time.monotonic()
        self._left_out = set[str]()  # died while the present server was started
        self._attend(server)

    def _attend(self, server: Server) -> None:
        self.server = server
        self._processes = server.processes
        self._seen = set[int]()
        self._down = set(self._left_out)
        self._ended = False
        self._stuck = set[str]()  # models with a load that never ends

    @property
    def is_stuck(self) -> bool:
        """Whether the server has a load that never ends."""
        return bool(self._stuck)

    def look(self) -> None:
        """Sees what has died, and does what can be done. Raises ServeError where a new server does not come up."""
        if not self._ended and (status := self.server.exit_status()) is not None:
            self._take_in_end(status)
        dead = self._processes.dead()
        self._seen &= {process.pid for process in dead}
        for process in map(self._named, dead):
            self._take_in(process)
        if self._is_busy():
            self._quiet_since_s = time.monotonic()
        for model in self._stuck - self._down:
            self._put_policy_back(model)
        if self._ended or self._down:
            self._repair_when_due()
        elif self._stuck and self._is_quiet():
            log.warning("the server is started again, for it cannot load %s", ", ".join(sorted(self._stuck)))
            self._restart()

    def _take_in_end(self, status: int) -> None:
        log.warning("the Triton server ended by itself with status %d", status)
        self._ended = True
        self._down = set(self._names)
        for model in self._names:
            self._have_asked(model)

    def _take_in(self, process: ModelProcess) -> None:
        loaded = self._processes.has_loaded(process)
        if process.pid not in self._seen:
            self._seen.add(process.pid)
            if loaded and self._told is not None:
                self._told.fail(process.model, process.version, "its process has died")
        if process.model not in self._names:
            return
        if not loaded:
            self._set_stuck(process.model)
        if process.model not in self._down:
            if self._is_live(process, loaded):
                self._down.add(process.model)
            elif loaded:
                self._load_again_beside(process)
            else:
                log.warning("the process of %s has died while it was loading: it does not go live", process)
                self._processes.settle(process)

    def _is_live(self, process: ModelProcess, loaded: bool) -> bool:
        """Whether the model answers nobody for it: Triton routes to the highest of the loaded versions."""
        versions = self._processes.loaded_versions(process.model)
        with contextlib.suppress(VersionError):
            versions &= set(live_versions(self._options.repository / process.model))
        return process.version == max(versions, default=process.version) if loaded else not versions

    def _named(self, process: ModelProcess) -> ModelProcess:
        """One that died before it could be seen is one that Triton is loading."""
        if not process.model:
            with contextlib.suppress(ClientError), contextlib.closing(TritonControl(self.server.grpc_url)) as triton:
                for model, version in triton.loading():
                    return replace(process, model=model, version=version)
        return process

    def _repair_when_due(self) -> None:
        if self._due_s is None:
            self._due_s = time.monotonic() + self._backoff.next_s()
        # Until then the other models and Triton itself are looked after as before.
        if time.monotonic() < self._due_s:
            return
        begun_s, before, names = time.monotonic(), set(self._down), ", ".join(sorted(self._down))
        if not self._must_restart():
            for model in sorted(self._down - self._stuck):
                log.warning("the process of %s has died: it is loaded again", model)
                self._load_again(model)
        if self._must_restart():
            what = "the Triton server has ended" if self._ended else f"the process of {names} has died"
            log.warning("%s: the server is started again", what)
            self._restart()
        self._due_s = None
        if not self._down:
            self._backoff.over()
        for model in sorted(before - self._down):
            log.warning("%s answers again after %.1f s", model, time.monotonic() - begun_s)
            self._have_asked(model)

    def _have_asked(self, model: str) -> None:
        if self._told is not None:
            self._told.suspect(model)

    def _must_restart(self) -> bool:
        if self._stop.is_set():
            return False
        if self._ended or _left_unended(self.server):
            return True
        stuck = self._stuck & self._down
        # Not again and again, at the cost of the other models' streams, for one that has died in the last start, too.
        return bool(stuck - self._left_out) or (bool(stuck) and self._is_quiet())

    def _load_again(self, model: str) -> None:
        dead = [process for process in self._processes.dead() if process.model == model]
        try:
            with contextlib.closing(TritonControl(self.server.grpc_url)) as triton:
                with contextlib.suppress(ServeError):  # not loaded at all
                    triton.unload(model, lambda: self._hopeless(model))
                triton.load(model, lambda: self._hopeless(model))
                for version in live_versions(self._options.repository / model):
                    triton.ask(model, version)
        except (StillhouseError, ClientError) as error:
            log.warning("%s could not be loaded again: %s", model, error)
            return
        for process in dead:  # Triton may still be about to let go of them
            self._processes.settle(process)
        self._down.discard(model)
        self._left_out.discard(model)

    def _load_again_beside(self, process: ModelProcess) -> None:
        """Loads a version that was kept again, while the live one goes on. One that cannot be is left out."""
        directory = self._options.repository / process.model
        with contextlib.suppress(_Busy, VersionError, OSError), held(directory, _Busy()):
            self._processes.settle(process)
            policy = live_versions(directory)
            others = [version for version in policy if version != process.version]
            if others == policy or process.model in self._stuck:
                return
            log.warning("the process of %s, which is not live, has died: it is loaded again", process)
            try:
                with contextlib.closing(TritonControl(self.server.grpc_url)) as triton:
                    for versions in (others, policy):
                        set_live_versions(directory, versions)
                        triton.load(process.model, lambda: self._hopeless(process.model))
                    triton.ask(process.model, process.version)
            except (StillhouseError, ClientError) as error:
                set_live_versions(directory, others)
                log.warning("%s could not be loaded again, and is left out: %s", process, error)
            else:
                log.warning("%s is loaded again", process)

    def _hopeless(self, model: str) -> str | None:
        """Why a load of `model` need not be waited for."""
        if self._stop.is_set():
            return "the server is to end"
        for process in map(self._named, self._processes.dead()):
            if process.model == model and not self._processes.has_loaded(process):
                self._set_stuck(model)
                return f"the process of {process} has died while it was loading"
        return None

    def _set_stuck(self, model: str) -> None:
        if model not in self._stuck:
            self._stuck.add(model)
            self._quiet_since_s = time.monotonic()  # time for those that wait for the load to be told

    def _put_policy_back(self, model: str) -> None:
        """Takes out of the policy what cannot be loaded until the server is started again; `promote` looks there."""
        directory, loaded = self._options.repository / model, self._processes.loaded_versions(model)
        with contextlib.suppress(VersionError, OSError):
            policy = live_versions(directory)
            possible = [version for version in policy if version in loaded]
            if possible and possible != policy:
                set_live_versions(directory, possible)

    def _restart(self) -> None:
        before = self.server
        before.stop(at_once=True)
        if before.log_file.is_file():  # it says what happened
            before.log_file.replace(f"{before.log_file}.1")
        self._left_out = set()
        while True:
            models = [name for name in self._names if name not in self._left_out]
            options = replace(self._options, ports=before.ports, log_file=before.log_file, models=models)
            try:
                started = start_server(options, stop=self._stop)
                break
            except LoadDied as error:
                log.warning("%s", error)
                if error.model in models and len(models) > 1:
                    self._left_out.add(error.model)
                elif self._stop.wait(self._backoff.next_s()):
                    raise ServeError("stopped before the server was ready") from error
        started.openai_url = before.openai_url
        self._attend(started)

    def _is_busy(self) -> bool:
        return any(count for pid, count in told_under_way(self.server.run_directory).items() if runs(pid))

    def _is_quiet(self) -> bool:
        return time.monotonic() - self._quiet_since_s > _QUIET_S


def _left_unended(server: Server) -> bool:
    """Whether processes that have died had requests under way: Triton leaves their clients without an end."""
    return any(count for pid, count in told_under_way(server.run_directory).items() if not runs(pid))


class _Busy(StillhouseError):
    """A promotion goes on: the version is looked at again when it is over."""

    def __init__(self) -> None:
        super().__init__("busy")
