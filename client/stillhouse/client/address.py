"""Which transport a URL asks for, and where it leads."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from stillhouse.client.errors import InvalidCall

_DEFAULT_PORTS = {"grpc": 8001, "grpcs": 8001, "http": 8000, "https": 443}
_HINT = "give host:port or grpc://host:port for gRPC, http://host:port for HTTP"


@dataclass(frozen=True)
class Address:
    """Where a server is: `is_grpc`, or else HTTP; `path` is a prefix before /v2 (HTTP only)."""

    is_grpc: bool
    tls: bool
    host: str  # an IPv6 address in its brackets
    port: int
    path: str = ""

    @property
    def authority(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def base_url(self) -> str:
        scheme = ("grpc" if self.is_grpc else "http") + ("s" if self.tls else "")
        return f"{scheme}://{self.authority}{self.path}"


def parse_url(url: str) -> Address:
    """The address in `url`; `host:port` alone is gRPC. Raises InvalidCall."""
    text = url.strip()
    try:
        parts = urlsplit(text if "://" in text else f"grpc://{text}")
    except ValueError as error:  # brackets without an IPv6 address between them, odd letters
        raise InvalidCall(f"a server's URL names a host, got {url!r}: {error}", hint=_HINT) from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise InvalidCall(f"a server's URL begins with grpc:// or http://, got {url!r}", hint=_HINT)
    try:
        port = parts.port
    except ValueError:
        raise InvalidCall(f"the port must be a number from 1 to 65535, got {url!r}", hint=_HINT) from None
    if not parts.hostname:
        raise InvalidCall(f"a server's URL names a host, got {url!r}", hint=_HINT)
    is_grpc = parts.scheme.startswith("grpc")
    path = parts.path.rstrip("/")
    if is_grpc and path:
        raise InvalidCall(f"a gRPC address has no path, got {url!r}", hint=_HINT)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Address(
        is_grpc=is_grpc,
        tls=parts.scheme in ("grpcs", "https"),
        host=host,
        port=_DEFAULT_PORTS[parts.scheme] if port is None else port,
        path=path,
    )
