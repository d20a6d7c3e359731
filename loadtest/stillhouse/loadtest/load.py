"""What a run asks for, and the Locust command line that comes of it."""

from __future__ import annotations

import math
import os
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stillhouse.loadtest.arrivals import KINDS
from stillhouse.loadtest.errors import BadInput
from stillhouse.loadtest.prompts import load_workload
from stillhouse.loadtest.shapes import Shape, load_shape
from stillhouse.loadtest.slo import parse_slo
from stillhouse.loadtest.synthetic import parse_synthetic

_HERE = Path(__file__).parent
_PACKAGES = ("stillhouse", "locust", "gevent", "hyperframe", "hpack", "urllib3", "hdrhistogram")
_GATHER_S = 15  # what dispatchers may need until all of them are there
USER_CLASSES: Mapping[str, str] = {"": "LlmUser", "triton": "TritonUser", "openai": "OpenAiUser"}


@dataclass(frozen=True)
class Load:
    """One run: a closed loop of `users`, or an open one at `rate` (requests a second), by `stages` or by a trace."""

    users: int = 4
    duration_s: float = 15.0
    rate: float = 0.0
    arrivals: str = "poisson"
    stages: str = ""  # a shape's name or TOML file
    prompts: Path | None = None
    synthetic: str = ""
    system_prompt: str = ""
    max_tokens: int = 64
    ignore_eos: bool = False
    stream: bool = True
    temperature: float = 0.0
    seed: int = 0
    slo: str = ""
    tokenizer: Path | None = None  # checks the server's counts
    timeout_s: float = 300.0  # of a whole answer
    token_timeout_s: float = 30.0
    stop_timeout_s: int = 30
    protocol: str = ""  # "triton", "openai", or "" to find out
    model_version: str = ""
    processes: int = 1

    @property
    def shape(self) -> Shape | None:
        return load_shape(self.stages, self.rate or None) if self.stages else None

    @cached_property
    def plan_s(self) -> float | None:
        """How long stages of a rate or a trace are: then the run ends by itself. None for what goes on and on."""
        if self.prompts is not None and (times_s := load_workload(self.prompts).times_s) is not None:
            return times_s[-1]
        shape = self.shape
        return None if shape is None or shape.in_users else shape.duration_s

    @property
    def open_loop(self) -> bool:
        return self.plan_s is not None or (self.rate > 0 and self.shape is None)

    @property
    def said(self) -> str:
        return f"{self.rate:g} requests/s" if self.rate else f"{self.users} users"

    @property
    def drain_s(self) -> int:
        """How long requests that are under way at the end are waited for; a closed loop's are cut off."""
        return self.stop_timeout_s if self.open_loop else 0

    def checked(self) -> Load:
        """The same, once everything that needs no server is known to make sense. Raises BadInput."""
        parse_slo(self.slo, streamed=self.stream)
        parse_synthetic(self.synthetic)
        if self.users < 1 or self.duration_s < 1 or self.processes < 1:
            given = f"{self.users} users, {self.duration_s:g} s and {self.processes} processes"
            raise BadInput(f"a run has 1 user, 1 second and 1 process at least, got {given}")
        if not 0 <= self.rate < math.inf:
            raise BadInput(f"a rate is a number of requests a second from 0, got {self.rate:g}")
        if self.arrivals not in KINDS:
            raise BadInput(f"arrivals are {' or '.join(KINDS)}, got {self.arrivals!r}")
        if self.protocol not in USER_CLASSES:
            raise BadInput(f"a protocol is triton or openai, got {self.protocol!r}")
        return self

    def to_json(self) -> dict[str, Any]:
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def locust_arguments(host: str, model: str, load: Load, folder: Path) -> list[str]:
    """The words after `locust`; it writes result.json and progress.json into `folder`."""
    shape = load.shape
    in_users = shape is not None and shape.in_users
    # An open loop's users are dispatchers: one a process is enough.
    users = load.processes if load.open_loop else load.users
    arguments = ["--locustfile", str(_HERE / "locustfile.py")]
    arguments += ["--headless", "--only-summary", "--loglevel", "WARNING", "--host", host]
    if not in_users:
        arguments += ["--users", str(users), "--spawn-rate", str(100 if load.open_loop else min(users, 100))]
        # A plan begins when all dispatchers are there, and is not to be cut off by the time that they took.
        whole = load.plan_s is not None and load.plan_s <= load.duration_s
        arguments += ["--run-time", f"{math.ceil(load.duration_s) + (_GATHER_S if whole else 0)}s"]
    if load.processes > 1:
        # A port of its own, so that two load tests can run on a machine.
        port = str(_free_port())
        arguments += ["--processes", str(load.processes), "--master-bind-host", "127.0.0.1"]
        arguments += ["--master-bind-port", port, "--master-port", port]
    if load.drain_s:
        arguments += ["--stop-timeout", str(load.drain_s)]
    arguments += ["--result", str(folder / "result.json"), "--progress", str(folder / "progress.json")]
    options = {
        "model": model,
        "model-version": load.model_version,
        "prompts": load.prompts and load.prompts.resolve(),
        "synthetic": load.synthetic,
        "system-prompt": _resolved(load.system_prompt),
        "rate": load.rate,
        "arrivals": load.arrivals,
        "stages": Path(load.stages).resolve() if load.stages.endswith(".toml") else load.stages,
        "max-tokens": load.max_tokens,
        "temperature": load.temperature,
        "seed": load.seed,
        "slo": load.slo,
        "tokenizer": load.tokenizer and load.tokenizer.resolve(),
        "timeout": load.timeout_s,
        "token-timeout": load.token_timeout_s,
    }
    # With "=", so that a value may begin with a dash.
    arguments += [f"--{name}={value}" for name, value in options.items() if value not in (None, "")]
    arguments += ["--ignore-eos"] if load.ignore_eos else []
    arguments += [] if load.stream else ["--no-stream"]
    # The names of classes come last: Locust's parser takes all words that follow.
    return [*arguments, USER_CLASSES[load.protocol]]


@cache
def environment_facts() -> dict[str, Any]:
    """The versions and the machine of the load generator."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": os.cpu_count(),
        "processor": _processor(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _resolved(system_prompt: str) -> str:
    return f"@{Path(system_prompt[1:]).resolve()}" if system_prompt.startswith("@") else system_prompt


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
