"""Addresses to listen on, and under which they are reached."""

from __future__ import annotations

import socket

from stillhouse.engine.errors import StillhouseError, UsageError


def bound(host: str, port: int) -> socket.socket:
    """A socket that is bound to the port (0: any free one). Raises UsageError or StillhouseError where it cannot be."""
    if not 0 <= port <= 65535:
        raise UsageError(f"a port must be between 0 and 65535, got {port}")
    try:
        family, kind, protocol, _, _ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # The protocol is named because asyncio switches Nagle's delays (40 ms an answer) off only where it is.
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except socket.gaierror as error:
        raise UsageError(f"--host {host} is not an address of this machine: {error.strerror}") from error
    except OSError as error:
        raise StillhouseError(
            f"port {port} on {host} cannot be used: {error.strerror}",
            hint="stop what listens there, or choose another with --openai-port (edge serve: --port)",
        ) from error
    return listening


def reachable(host: str) -> str:
    """The address under which a server that listens on `host` is reached from this machine."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"
    return f"[{host}]" if ":" in host else host
