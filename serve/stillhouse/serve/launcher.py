"""Starts Triton on a repository, waits until it really answers, and ends it without leaving anything behind."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from stillhouse.engine.errors import UsageError
from stillhouse.gateway.address import reachable
from stillhouse.serve.errors import PortInUse, ServeError
from stillhouse.serve.leftovers import is_ending, new_run_directory, remove_leftovers, shm_prefix
from stillhouse.serve.others import load_others, other_models
from stillhouse.serve.ports import Ports, settle_ports
from stillhouse.serve.processes import Processes
from stillhouse.serve.protocol import DRAIN_FILE
from stillhouse.serve.repository import ServedModel, checked_engine_options, served_models
from stillhouse.serve.startup import wait_until_ready
from stillhouse.serve.tritonserver import (
    TritonInstall,
    find_libpython,
    find_tritonserver,
    lay_out_backends,
    server_environment,
)

if TYPE_CHECKING:
    from stillhouse.gateway.gateway import Access

log = logging.getLogger(__name__)

# What runs is cut when the grace time is over; the server itself must not give up before.
_EXIT_EXTRA_S = 1
_PORTS_WAIT_S = 10.0
_LONGEST_GRACE_S = 86_400.0


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How to serve: `models` None means all; `engine` are engine options that go on top of each engine.json.

    `host` is the address of Triton's ports, `openai_host` the gateway's (None: the same). Raises UsageError for a grace
    time that is none.
    """

    repository: Path
    host: str = "127.0.0.1"
    ports: Ports = field(default_factory=Ports)
    models: Sequence[str] | None = None
    tritonserver: Path | None = None
    engine: dict[str, int | None] = field(default_factory=dict)
    log_file: Path | None = None
    grace_s: float = 30.0
    ready_timeout_s: float = 300.0
    openai_host: str | None = None
    openai_port: int | None = None  # None: no gateway
    access: Access | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.grace_s <= _LONGEST_GRACE_S:  # which nan is not
            raise UsageError(f"--grace must be between 0 and {_LONGEST_GRACE_S:g} seconds, got {self.grace_s:g}")


class Server:
    """A running Triton. `stop()` ends it; when this process dies, by whatever signal, it ends too."""

    def __init__(
        self,
        guard: subprocess.Popen[bytes],
        host: str,
        ports: Ports,
        models: list[ServedModel],
        log_file: Path,
        run_directory: Path,
    ) -> None:
        self.models = models
        self.log_file = log_file
        self.run_directory = run_directory
        self.host = host
        self.ports = ports
        self.openai_url: str | None = None
        self.processes = Processes(run_directory)
        self._guard = guard

    @property
    def http_url(self) -> str:
        return f"http://{reachable(self.host)}:{self.ports.http}"

    @property
    def grpc_url(self) -> str:
        return f"grpc://{reachable(self.host)}:{self.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        return f"http://{reachable(self.host)}:{self.ports.metrics}/metrics"

    @property
    def pid(self) -> int:
        """The process of tritonserver itself."""
        return int((self.run_directory / "server.pid").read_text())

    def exit_status(self) -> int | None:
        """None while the server runs."""
        return self._guard.poll()

    def wait(self, timeout_s: float) -> bool:
        """Waits for the server to end by itself; false if it still runs after `timeout_s`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guard.wait(timeout_s)
        return self._guard.returncode is not None

    def drain(self, *, stuck: bool = False) -> None:
        """Has the server refuse what is new and end when what runs has ended, or been cut; returns at once.

        `stuck`: it has a load that never ends, for which it would wait.
        """
        self._tell("stuck" if stuck else "stop")

    def stop(self, *, at_once: bool = False) -> int:
        """Drains and ends the server (`at_once`: kills it), waits until nothing is left, returns its exit status."""
        self._tell("kill" if at_once else "stop")
        return self._guard.wait()

    def hurry(self) -> None:
        """Cuts the grace time of a stop() short; may be called from another thread or a signal handler."""
        self._tell("kill")

    def _tell(self, word: str) -> None:
        if self._guard.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._guard.stdin.fileno(), f"{word}\n".encode())


def start_server(options: ServeOptions, *, stop: threading.Event | None = None) -> Server:
    """Starts Triton on `options.repository` and returns once every model has answered a question.

    Raises StillhouseError (a port in use, no repository, a model that does not load, …), with nothing left running.
    `stop`, once set, ends the wait: ServeError.
    """
    stop = stop or threading.Event()
    models = served_models(options.repository, options.models)
    engine_options = checked_engine_options(options.repository, models, options.engine)
    install = find_tritonserver(options.tritonserver)
    libpython = find_libpython()
    for leftover in remove_leftovers():
        log.info("cleaned up after a run that was killed: %s", leftover.name)
    ports = _ports_of(options, stop)
    log_file = (options.log_file or _default_log_file(ports)).absolute()

    run_directory, lock = new_run_directory()
    try:
        command = _command(options, install, ports, models, run_directory)
        environment = server_environment(libpython, json.dumps(engine_options), run_directory / DRAIN_FILE)
        guard = _spawn_guard(command, environment, run_directory, lock, options.grace_s, log_file)
    except BaseException:
        shutil.rmtree(run_directory, ignore_errors=True)
        raise
    finally:
        # From here on the guard alone holds the lock.
        os.close(lock)
    server = Server(guard, options.host, ports, models, log_file, run_directory)
    try:
        wait_until_ready(server, options.ready_timeout_s, stop)
        others = other_models(options.repository, options.models)
        load_others(server.grpc_url, others, lambda model: _hopeless(server, model, stop))
    except BaseException:
        server.stop(at_once=True)
        raise
    return server


def _hopeless(server: Server, model: str, stop: threading.Event) -> str | None:
    """Why there is no use in waiting for Triton to load `model`, of another backend."""
    if stop.is_set():
        return "the server is to end"
    died = any(process.model == model for process in server.processes.dead())
    return "its process died while it was loading" if died else None


def _ports_of(options: ServeOptions, stop: threading.Event) -> Ports:
    """As settle_ports(), which waits a while for a run before this one to let go of them."""
    wanted, until_s = options.ports, time.monotonic() + _PORTS_WAIT_S
    while time.monotonic() < until_s:
        with contextlib.suppress(PortInUse):
            return settle_ports(options.host, wanted)
        if not is_ending([port for port in (wanted.http, wanted.grpc, wanted.metrics) if port]) or stop.wait(0.1):
            break
    return settle_ports(options.host, wanted)


@contextlib.contextmanager
def running_server(
    repository: Path,
    *,
    models: Sequence[str] | None = None,
    http_port: int = 0,
    grpc_port: int = 0,
    metrics_port: int = 0,
    engine: dict[str, int | None] | None = None,
    log_file: Path | None = None,
    grace_s: float = 5.0,
    tritonserver: Path | None = None,
) -> Iterator[Server]:
    """A server on free ports (0) for the time of a `with` block; see start_server() for errors."""
    options = ServeOptions(
        repository,
        ports=Ports(http_port, grpc_port, metrics_port),
        models=models,
        engine=engine or {},
        log_file=log_file,
        grace_s=grace_s,
        tritonserver=tritonserver,
    )
    server = start_server(options)
    try:
        yield server
    finally:
        server.stop()


def _command(
    options: ServeOptions,
    install: TritonInstall,
    ports: Ports,
    models: list[ServedModel],
    run_directory: Path,
) -> list[str]:
    backends = lay_out_backends(install, run_directory / "backends")
    return [
        str(install.binary),
        f"--model-repository={options.repository.absolute()}",
        f"--backend-directory={backends}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix(run_directory)}",
        "--model-control-mode=explicit",
        *(f"--load-model={model.name}" for model in models),
        f"--http-address={options.host}",
        f"--http-port={ports.http}",
        f"--grpc-address={options.host}",
        f"--grpc-port={ports.grpc}",
        "--grpc-infer-allocation-pool-size=0",  # each of the pool's messages would keep the room of its largest body
        f"--metrics-address={options.host}",
        f"--metrics-port={ports.metrics}",
        f"--exit-timeout-secs={math.ceil(options.grace_s) + _EXIT_EXTRA_S}",
    ]


def _spawn_guard(
    command: list[str],
    environment: dict[str, str],
    run_directory: Path,
    lock: int,
    grace_s: float,
    log_file: Path,
) -> subprocess.Popen[bytes]:
    guard = Path(__file__).with_name("guard.py")
    settings = [str(run_directory), shm_prefix(run_directory), str(grace_s)]
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        output = log_file.open("wb")
    except OSError as error:
        raise ServeError(
            f"the log file {log_file} cannot be written: {error.strerror}", hint="choose one with --log-file"
        ) from error
    with output:
        output.write(f"{time.strftime('%F %T')} {' '.join(command)}\n".encode())
        output.flush()
        # A session of its own: Ctrl-C in a terminal reaches the launcher, which drains, and not the server.
        return subprocess.Popen(
            [sys.executable, "-I", str(guard), *settings, "--", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            pass_fds=(lock,),
            start_new_session=True,
        )


def _default_log_file(ports: Ports) -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "stillhouse" / f"triton-{ports.http}.log"
