"""`stillhouse edge serve`: loads versions, puts the gateway before them, follows updates, ends when it is told to."""

from __future__ import annotations

import asyncio
import functools
import http.client
import logging
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from stillhouse.edge.device import Device
from stillhouse.edge.following import Follower, Load, Place, load_live
from stillhouse.edge.generating import EngineGenerator
from stillhouse.edge.notify import notify, watchdog_s
from stillhouse.edge.telemetry import DeviceFigures
from stillhouse.engine.errors import UsageError
from stillhouse.engine.model import LanguageModel
from stillhouse.engine.options import EngineOptions
from stillhouse.gateway.gateway import Access
from stillhouse.gateway.generator import Generator
from stillhouse.gateway.server import GatewayServer

log = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 5.0
# The server is on this machine: no proxy of the environment lies between.
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def serve(
    places: Sequence[Place],
    load: Load,
    host: str,
    port: int,
    access: Access,
    grace_s: float,
    announce: Callable[[GatewayServer], None],
) -> None:
    """Serves until SIGINT or SIGTERM (a second one cuts the grace time short); must run in the main thread.

    The port is bound and answers 503 while the models are loaded; `announce` is called when they are. systemd is told
    when it is ready, and then as long as /health says that it is well. Raises StillhouseError for a version that does
    not load (and has none before it that does) or a port that is taken.
    """
    asked, hurried = threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        (hurried if asked.is_set() else asked).set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    server, follower = GatewayServer(host, port, access), None
    try:
        server.start()
        server.gateway.metrics.add(DeviceFigures(Device()))
        server.plug(lambda: open_places(places, load))
        generator = server.gateway.generator
        assert isinstance(generator, EngineGenerator)
        names = [model.name for model in generator.models()]
        follower = Follower(dict(zip(names, places, strict=True)), generator, load)
        follower.start()
        announce(server)
        notify("READY=1", f"STATUS=serving {', '.join(names)} on {server.url}")
        _watch(server.url, asked, follower)
        log.info("ending: running requests have %g s to finish", grace_s)
    finally:
        notify("STOPPING=1")
        if follower is not None:
            follower.stop()
        server.drain(grace_s, hurry=hurried)
        for number, handler in before.items():
            signal.signal(number, handler)


async def open_engines(versions: Sequence[tuple[Path, EngineOptions]]) -> Generator:
    """The versions, loaded one after the other with their options. Raises StillhouseError, with none left loaded."""
    return await _open([functools.partial(LanguageModel.load, *version) for version in versions])


async def open_places(places: Sequence[Place], load: Load) -> Generator:
    """The live version of each place. Raises StillhouseError, with none left loaded."""
    return await _open([functools.partial(load_live, place, load) for place in places])


async def _open(loads: Sequence[Callable[[], LanguageModel]]) -> Generator:
    loop, models = asyncio.get_running_loop(), list[LanguageModel]()
    try:
        for load in loads:
            model = await loop.run_in_executor(None, load)
            models.append(model)
            name = model.version.manifest.model
            if [other.version.manifest.model for other in models].count(name) > 1:
                raise UsageError(f"two of the directories hold versions of {name}", hint="give one of them")
        return EngineGenerator(models)
    except BaseException:
        for model in models:
            await loop.run_in_executor(None, model.close)
        raise


def _watch(url: str, asked: threading.Event, follower: Follower) -> None:
    """Waits until it is told to end; meanwhile tells systemd's watchdog that the server is well, while it is.

    While one version is exchanged for another, /health says that it cannot answer: a restart would not help.
    """
    every_s, due_s = watchdog_s(), 0.0
    while not asked.wait(0.2):
        if every_s is not None and time.monotonic() >= due_s and (follower.changing or _is_well(url)):
            notify("WATCHDOG=1")
            due_s = time.monotonic() + every_s / 3


def _is_well(url: str) -> bool:
    """Whether /health, asked over HTTP as anybody would, says so."""
    try:
        with _DIRECTLY.open(f"{url}/health", timeout=_PROBE_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException) as error:
        log.warning("the health check fails: %s", error)
        return False
