"""Looks after the models' processes: Triton neither restarts one that has died, nor ends its streams, nor says so."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from stillhouse.client import ClientError
from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.policy import live_versions
from stillhouse.serve.control import TritonControl
from stillhouse.serve.launcher import ServeOptions, Server, start_server
from stillhouse.serve.under_way import told_under_way

log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 30.0
_SOUND_AFTER_S = 120.0
_LIST_EVERY_S = 1.0


class Processes:
    """The processes of a server's models; looked at several times a second."""

    def __init__(self, server: Server) -> None:
        self._server = psutil.Process(server.pid)
        self._children: list[psutil.Process] = []
        self._listed_s = -math.inf
        self._served = {model.name for model in server.models}  # another backend's are not looked after
        self._models: dict[int, str] = {}  # by process
        self._ended: set[int] = set()
        self.dead_models()

    def dead_models(self) -> list[str]:
        """The models of which a process has died.

        Such a one stays a zombie, since Triton does not ask after it; one that it has ended itself is one for an
        instant at most, so it is the second look that counts.
        """
        # To list them takes a look at every process of the machine: that is not done at each look.
        if time.monotonic() - self._listed_s >= _LIST_EVERY_S:
            self._list()
        ended = set()
        for process in self._children:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_ZOMBIE:
                    ended.add(process.pid)
        dead = {self._models[process] for process in ended & self._ended if process in self._models}
        self._ended = ended
        return sorted(dead)

    def _list(self) -> None:
        self._listed_s = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):
            self._children = self._server.children()
        for process in self._children:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid not in self._models and (model := _model_of(process.cmdline())) in self._served:
                    self._models[process.pid] = model


class Backoff:
    """How long to wait before a repair: not at all, unless the one before was a moment ago; then longer each time."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._last_s = -math.inf
        self._wait_s = 0.0

    def next_s(self) -> float:
        """0, then 1, 2, 4 … at most 30 s; 0 again after two minutes without a repair."""
        now_s = self._clock_s()
        again = now_s - self._last_s < _SOUND_AFTER_S
        self._wait_s = min(_LONGEST_WAIT_S, max(1.0, 2 * self._wait_s)) if again else 0.0
        self._last_s = now_s + self._wait_s
        if self._wait_s:
            log.warning("it is not long since the last repair: the next is in %g s", self._wait_s)
        return self._wait_s


def repair(
    server: Server, options: ServeOptions, models: Sequence[str], *, stop: threading.Event
) -> tuple[Server, list[str]]:
    """Has `models`, whose processes have died, served again.

    Returns the server that does, this one or a new one, and those of `models` that still do not answer: the others are
    served all the same. Where nothing was under way the models are unloaded and loaded. Otherwise the server is started
    anew, for Triton would leave the clients of those streams without an end. Raises ServeError where that one does not
    come up.
    """
    begun_s = time.monotonic()
    names = ", ".join(models)
    if not _left_unended(server):
        log.warning("the process of %s has died: it is loaded again", names)
        down = [model for model in models if not _reloaded(server, options.repository, model)]
        if answering := [model for model in models if model not in down]:
            log.warning("%s answers again after %.1f s", ", ".join(answering), time.monotonic() - begun_s)
        return server, down
    log.warning("the process of %s has died with requests under way: the server is started again", names)
    server.stop(at_once=True)
    if server.log_file.is_file():  # it says what happened
        server.log_file.replace(f"{server.log_file}.1")
    started = start_server(replace(options, ports=server.ports, log_file=server.log_file), stop=stop)
    started.openai_url = server.openai_url
    log.warning("%s answers again after %.1f s", names, time.monotonic() - begun_s)
    return started, []


def _reloaded(server: Server, repository: Path, model: str) -> bool:
    try:
        with contextlib.closing(TritonControl(server.grpc_url)) as triton:
            triton.unload(model)
            triton.load(model)
            for version in live_versions(repository / model):
                triton.ask(model, version)
    except (StillhouseError, ClientError) as error:
        log.warning("%s could not be loaded again: %s", model, error)
        return False
    return True


def _left_unended(server: Server) -> int:
    """How many requests the processes that have died had under way."""
    return sum(count for process, count in told_under_way(server.run_directory).items() if not _runs(process))


def _runs(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _model_of(command: Sequence[str]) -> str | None:
    """The model that a process of Triton's Python backend serves: its first argument is MODEL/VERSION/model.py."""
    if len(command) < 2 or not command[0].endswith("triton_python_backend_stub"):
        return None
    return Path(command[1]).parent.parent.name
