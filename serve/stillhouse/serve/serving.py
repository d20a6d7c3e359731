"""`stillhouse serve`: Triton and the gateway until a signal; what dies meanwhile is started again."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from stillhouse.serve.errors import ServeError
from stillhouse.serve.launcher import ServeOptions, Server, start_server
from stillhouse.serve.openai import plug_triton, start_gateway
from stillhouse.serve.ports import is_loopback
from stillhouse.serve.supervisor import Supervisor

if TYPE_CHECKING:
    from stillhouse.gateway.server import GatewayServer
    from stillhouse.serve.generating import TritonGenerator

log = logging.getLogger(__name__)

_LOOK_S = 0.2


def serve(options: ServeOptions, announce: Callable[[Server], None]) -> int:
    """Serves until SIGINT or SIGTERM (a second one cuts the grace time short); must run in the main thread.

    Calls `announce` once, when the server answers. Returns 0 after a stop that was asked for, and raises ServeError
    if the server does not come up, or not again after it or a model's process has died.
    """
    asked, hurry, supervisor = threading.Event(), threading.Event(), None

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if asked.is_set():
            hurry.set()
            if supervisor is not None:
                supervisor.server.hurry()
        asked.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    # Before Triton, so that whoever asks meanwhile is told that the models are being loaded.
    gateway = start_gateway(options.openai_host or options.host, options.openai_port, options.access)
    if (warning := unguarded(options)) is not None:
        log.warning(warning)
    try:
        server = start_server(options, stop=asked)
        generator: TritonGenerator | None = None
        if gateway is not None:
            generator = plug_triton(gateway, server, options.repository, options.engine)
            server.openai_url = gateway.url
        supervisor = Supervisor(server, options, generator, asked)
        announce(server)
        while not asked.wait(_LOOK_S):
            supervisor.look()
        log.info("ending: running requests have %g s to finish", options.grace_s)
        _drain(gateway, generator, supervisor, options.grace_s, hurry)
        return 0
    except ServeError:
        # Told to stop while a server was being started.
        if asked.is_set():
            return 0
        raise
    finally:
        if gateway is not None:
            gateway.drain(0.0)
        for number, handler in before.items():
            signal.signal(number, handler)


def unguarded(options: ServeOptions) -> str | None:
    """What whoever asks for keys has to know where Triton's own ports can be reached from elsewhere."""
    if options.openai_port is None or not (options.access and options.access.keys) or is_loopback(options.host):
        return None
    return (
        f"the API keys protect the gateway alone: Triton's own ports on {options.host} answer whoever can reach them"
        " (--triton-host 127.0.0.1 keeps them on this machine)"
    )


def _drain(
    gateway: GatewayServer | None,
    generator: TritonGenerator | None,
    supervisor: Supervisor,
    grace_s: float,
    hurry: threading.Event,
) -> None:
    """Both refuse what is new at once, and what runs has one grace time in both; `hurry` cuts the gateway's short."""
    if gateway is not None:
        gateway.refuse()
    if generator is not None:
        generator.rest()
    supervisor.server.drain(stuck=supervisor.is_stuck)
    if gateway is not None:
        gateway.drain(grace_s, hurry=hurry)
    supervisor.server.stop()
