"""The server's three ports: chosen, and checked before anything is started."""

from __future__ import annotations

import contextlib
import ipaddress
import random
import socket
from dataclasses import dataclass

from stillhouse.engine.errors import UsageError
from stillhouse.serve.errors import PortInUse

# Below the ports that Linux hands out for outgoing connections, so that none of those takes a port from us.
_FREE_PORTS = range(20_000, 32_000)


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports to listen on; 0 asks for any free one."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def settle_ports(host: str, wanted: Ports) -> Ports:
    """`wanted` with every 0 replaced by a free port. Raises PortInUse, or UsageError for what cannot be a port."""
    taken: dict[int, str] = {}
    for kind in ("http", "grpc", "metrics"):
        port: int = getattr(wanted, kind)
        if not 0 <= port <= 65535:
            raise UsageError(f"--{kind}-port must be between 0 and 65535, got {port}")
        if port in taken:
            raise UsageError(f"--{kind}-port and --{taken[port]}-port are both {port}", hint="give each its own")
        if port:
            _check_free(host, port, kind)
            taken[port] = kind
    settled: dict[str, int] = {}
    for kind in ("http", "grpc", "metrics"):
        settled[kind] = getattr(wanted, kind) or _free_port(host, taken)
        taken[settled[kind]] = kind
    return Ports(**settled)


def _check_free(host: str, port: int, kind: str) -> None:
    try:
        _bind(host, port)
    except socket.gaierror as error:
        raise UsageError(f"--host {host} is not an address of this machine: {error.strerror}") from error
    except OSError as error:
        raise PortInUse(
            f"port {port} on {host} cannot be used: {error.strerror}",
            hint=f"stop what listens there, or choose another with --{kind}-port",
        ) from error


def _free_port(host: str, taken: dict[int, str]) -> int:
    for port in random.sample(_FREE_PORTS, 200):
        if port not in taken:
            try:
                _bind(host, port)
            except OSError:
                continue
            return port
    raise PortInUse(f"no free port was found on {host}", hint="name ports with --http-port and its like")


def _bind(host: str, port: int) -> None:
    """Binds and lets go; as servers do, over what is left of closed connections."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
