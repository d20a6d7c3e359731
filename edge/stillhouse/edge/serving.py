"""`stillhouse edge serve`: loads versions, puts the gateway before them, ends when it is told to."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from stillhouse.edge.generating import EngineGenerator
from stillhouse.engine.errors import UsageError
from stillhouse.engine.model import LanguageModel
from stillhouse.engine.options import EngineOptions
from stillhouse.gateway.gateway import Access
from stillhouse.gateway.generator import Generator
from stillhouse.gateway.server import GatewayServer

log = logging.getLogger(__name__)


def serve(
    versions: Sequence[tuple[Path, EngineOptions]],
    host: str,
    port: int,
    access: Access,
    grace_s: float,
    announce: Callable[[GatewayServer], None],
) -> None:
    """Serves until SIGINT or SIGTERM (a second one cuts the grace time short); must run in the main thread.

    The port is bound and answers 503 while the models are loaded; `announce` is called when they are.
    Raises StillhouseError for a version that does not load or a port that is taken.
    """
    asked, hurried = threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        (hurried if asked.is_set() else asked).set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    server = GatewayServer(host, port, access)
    try:
        server.start()
        server.plug(lambda: open_engines(versions))
        announce(server)
        while not asked.wait(0.2):
            pass
        log.info("ending: running requests have %g s to finish", grace_s)
    finally:
        server.drain(grace_s, hurry=hurried)
        for number, handler in before.items():
            signal.signal(number, handler)


async def open_engines(versions: Sequence[tuple[Path, EngineOptions]]) -> Generator:
    """The versions, loaded one after the other. Raises StillhouseError, with none left loaded."""
    loop, models = asyncio.get_running_loop(), list[LanguageModel]()
    try:
        for directory, options in versions:
            model = await loop.run_in_executor(None, LanguageModel.load, directory, options)
            models.append(model)
            name = model.version.manifest.model
            if [other.version.manifest.model for other in models].count(name) > 1:
                raise UsageError(f"two of the directories hold versions of {name}", hint="give one of them")
        return EngineGenerator(models)
    except BaseException:
        for model in models:
            await loop.run_in_executor(None, model.close)
        raise
