"""The gateway before a Triton server: started with it, plugged in when it answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stillhouse.gateway.gateway import Access
    from stillhouse.gateway.server import GatewayServer
    from stillhouse.serve.generating import TritonGenerator
    from stillhouse.serve.launcher import Server


def start_gateway(host: str, port: int | None, access: Access | None) -> GatewayServer | None:
    """A gateway that says 503 until something is plugged in; None where there is no port for it."""
    if port is None:
        return None
    # Loaded by those alone who want it: FastAPI takes half a second.
    from stillhouse.gateway.server import GatewayServer

    gateway = GatewayServer(host, port, access)
    gateway.start()
    return gateway


def plug_triton(
    gateway: GatewayServer, server: Server, repository: Path, engine: Mapping[str, int | None]
) -> TritonGenerator:
    """Lets the gateway answer with the models of `server`. `engine`: the options on top of each engine.json."""
    from stillhouse.serve.generating import TritonGenerator
    from stillhouse.serve.live import LiveModel

    opened: list[TritonGenerator] = []

    async def open_generator() -> TritonGenerator:
        models = [LiveModel(repository / model.name, dict(engine)) for model in server.models]
        opened.append(await TritonGenerator(server.grpc_url, models).open())
        return opened[0]

    gateway.plug(open_generator)
    return opened[0]


@contextmanager
def running_gateway(
    server: Server,
    repository: Path,
    *,
    port: int = 0,
    access: Access | None = None,
    engine: Mapping[str, int | None] | None = None,
    grace_s: float = 5.0,
) -> Iterator[GatewayServer]:
    """A gateway before a running server, on a free port (0), for the time of a `with` block."""
    gateway = start_gateway("127.0.0.1", port, access)
    assert gateway is not None
    try:
        plug_triton(gateway, server, repository, engine or {})
        yield gateway
    finally:
        gateway.drain(grace_s)
