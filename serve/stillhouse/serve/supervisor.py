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
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from stillhouse.client import ClientError, TimedOut
from stillhouse.engine.directory import held
from stillhouse.engine.errors import StillhouseError, VersionError
from stillhouse.engine.policy import live_versions, set_live_versions
from stillhouse.serve.backoff import Backoff
from stillhouse.serve.control import TritonControl
from stillhouse.serve.errors import ServeError
from stillhouse.serve.launcher import ServeOptions, Server
from stillhouse.serve.processes import ModelProcess, runs
from stillhouse.serve.restart import restart
from stillhouse.serve.under_way import told_under_way

log = logging.getLogger(__name__)

_QUIET_S = 10.0
_LONGEST_QUIET_S = 600.0
_LAST_WORDS_S = 1.0
_SERVER = ""  # beside the models' names


class Told(Protocol):
    """Who is told of deaths and returns: the gateway's side of the models."""

    def fail(self, name: str, version: int, reason: str) -> None: ...

    def suspect(self, name: str) -> None: ...


class Supervisor:
    """Keeps the models of a server answering; `look()` is called several times a second. `server` is the present one.

    A model whose live version has died is down: it is unloaded and loaded, or the server is started again where that
    cannot be, or where Triton would leave the clients of streams without an end. Whatever dies beside a live version
    must not touch it: a version that was kept is loaded again alone, one that was being loaded is taken out of the
    policy, which is what `promote` looks at while it waits.
    """

    def __init__(
        self,
        server: Server,
        options: ServeOptions,
        told: Told | None,
        stop: threading.Event,
        backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self.server = server
        self._options, self._told, self._stop = options, told, stop
        self._names = [model.name for model in server.models]
        self._backoffs = defaultdict[str, Backoff](backoff)  # by model
        self._quiet_since_s, self._quiet_s = time.monotonic(), _QUIET_S
        self._attend(server, set())

    def _attend(self, server: Server, left_out: set[str]) -> None:
        self.server = server
        self._processes = server.processes
        self._ended = False
        self._left_out = left_out  # could not be loaded while it was started
        self._seen = set[int]()
        self._stuck = set[str]()  # models with a load that never ends; of other backends, too
        self._due_s = dict[str, float]()  # when those that are down are repaired
        self._put_off(left_out)

    @property
    def is_stuck(self) -> bool:
        """Whether the server has a load that never ends."""
        return bool(self._stuck)

    def look(self) -> None:
        """Sees what has died, and does what can be done. Raises ServeError where no new server can be started."""
        if not self._ended and (status := self.server.exit_status()) is not None:
            self._take_in_end(status)
        dead = self._processes.dead()
        self._seen &= {process.pid for process in dead}
        for process in map(self._named, dead):
            self._take_in(process)
        if self._is_busy():
            self._quiet_since_s = time.monotonic()
        stuck = self._stuck.intersection(self._names) - self._due_s.keys()
        for model in stuck:
            self._put_policy_back(model)
        if due := sorted(model for model, due_s in self._due_s.items() if due_s <= time.monotonic()):
            self._repair(due)
        elif stuck and self._is_quiet():
            log.warning("the server is started again, for it cannot load %s", ", ".join(sorted(stuck)))
            self._restart()

    def _put_off(self, models: Iterable[str]) -> None:
        """Has the next repair of `models`, which are down, come when each of them may be repaired again."""
        for model in models:
            self._due_s[model] = time.monotonic() + self._backoffs[model].next_s()

    def _take_in_end(self, status: int) -> None:
        log.warning("the Triton server ended by itself with status %d", status)
        self._ended = True
        self._due_s = dict.fromkeys(self._names, time.monotonic() + self._backoffs[_SERVER].next_s())
        for model in self._names:
            self._have_asked(model)

    def _take_in(self, process: ModelProcess) -> None:
        loaded = self._processes.has_loaded(process)
        if process.pid not in self._seen:
            self._seen.add(process.pid)
            if loaded and self._told is not None:
                self._told.fail(process.model, process.version, "its process has died")
        if not loaded:
            self._set_stuck(process.model)
        if process.model in self._names and process.model not in self._due_s:
            if self._is_live(process, loaded):
                self._put_off([process.model])
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

    def _repair(self, due: list[str]) -> None:
        begun_s, before = time.monotonic(), set(self._due_s)
        if not self._must_restart(due):
            for model in due:
                if model not in self._stuck:
                    log.warning("the process of %s has died: it is loaded again", model)
                    self._load_again(model)
        if self._must_restart(due):
            what = "the Triton server has ended" if self._ended else f"the process of {', '.join(due)} has died"
            log.warning("%s: the server is started again", what)
            self._restart()
        self._put_off(model for model in due if self._due_s.get(model, math.inf) <= begun_s)
        for model in sorted(before - self._due_s.keys()):
            log.warning("%s answers again after %.1f s", model, time.monotonic() - begun_s)
            self._backoffs[model].over()
            self._have_asked(model)

    def _have_asked(self, model: str) -> None:
        if self._told is not None:
            self._told.suspect(model)

    def _must_restart(self, due: list[str]) -> bool:
        if self._stop.is_set():
            return False
        if self._ended or _left_unended(self.server):
            return True
        stuck = self._stuck.intersection(due)
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
                    with contextlib.suppress(TimedOut):  # busy: it would not be loaded if it did not answer
                        triton.ask(model, version)
        except (StillhouseError, ClientError) as error:
            log.warning("%s could not be loaded again: %s", model, error)
            return
        for process in dead:  # Triton may still be about to let go of them
            self._processes.settle(process)
        self._due_s.pop(model, None)
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
                if self.server.wait(_LAST_WORDS_S):  # it died with Triton, which was no fault of its own
                    set_live_versions(directory, policy)
                    return
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
        started, left_out = restart(self.server, self._options, self._names, self._stop, self._backoffs[_SERVER])
        # The others' streams are not cut again and again for one that never loads.
        self._quiet_s = min(_LONGEST_QUIET_S, 2 * self._quiet_s) if left_out else _QUIET_S
        self._attend(started, left_out)

    def _is_busy(self) -> bool:
        return any(count for pid, count in told_under_way(self.server.run_directory).items() if runs(pid))

    def _is_quiet(self) -> bool:
        return time.monotonic() - self._quiet_since_s > self._quiet_s


def _left_unended(server: Server) -> bool:
    """Whether processes that have died had requests under way: Triton leaves their clients without an end."""
    return any(count for pid, count in told_under_way(server.run_directory).items() if not runs(pid))


class _Busy(StillhouseError):
    """A promotion goes on: the version is looked at again when it is over."""

    def __init__(self) -> None:
        super().__init__("busy")
