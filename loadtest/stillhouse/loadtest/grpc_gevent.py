"""The transport of a `Client` whose streams are greenlets: gRPC over HTTP/2, without grpc's own library.

That one waits in threads of its own, and under gevent each of its waits is handed to another thread and back: some
milliseconds of every first token (docs/loadtest.md). Here the thread of the greenlets reads the socket itself, and a
reply's time is when it was read. https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

import struct
import time
from collections import deque
from typing import Any
from urllib.parse import unquote

import gevent.socket
import gevent.ssl
import grpc
from gevent.lock import RLock
from tritonclient.grpc import service_pb2

from stillhouse.client import grpc_wire
from stillhouse.client.address import Address
from stillhouse.client.types import ModelEntry, Reply, Request
from stillhouse.loadtest.http2 import Arrived, Connection, Http2Error, Stream, header_block

_SERVICE = "/inference.GRPCInferenceService/"
_PREFIX = struct.Struct(">?I")  # before each message: whether it is compressed, and its length
_STATUSES = {code.value[0]: code for code in grpc.StatusCode}


class GreenletTransport:
    """Connections to one server, made when they are needed; the greenlets of one thread may share them."""

    def __init__(self, address: Address, connect_timeout_s: float) -> None:
        self.authority = address.authority
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        self._blocks: dict[str, bytes] = {}
        self._connections: list[Connection] = []
        self._connecting = RLock()
        self._failed: tuple[float, OSError] | None = None

    def open(self, request: Request) -> GrpcStream:
        call = self._call("ModelStreamInfer", grpc_wire.write_request(request), request.model)
        return GrpcStream(call, request)

    def models(self) -> list[ModelEntry]:
        return grpc_wire.read_index(self._ask("RepositoryIndex", service_pb2.RepositoryIndexRequest()))

    def ready(self, model: str, version: str) -> bool:
        if not model:
            return bool(self._ask("ServerReady", service_pb2.ServerReadyRequest()).ready)
        return bool(self._ask("ModelReady", service_pb2.ModelReadyRequest(name=model, version=version), model).ready)

    def input_names(self, model: str, version: str) -> set[str]:
        """The inputs of a model, as its metadata has them. Raises ClientError."""
        question = service_pb2.ModelMetadataRequest(name=model, version=version)
        return {str(entry.name) for entry in self._ask("ModelMetadata", question, model).inputs}

    def close(self) -> None:
        while self._connections:
            self._connections.pop().close()

    def _ask(self, method: str, question: Any, model: str | None = None) -> Any:
        call = self._call(method, question, model)
        try:
            found = call.next(self._connect_timeout_s)
        except TimeoutError:
            raise grpc_wire.error_of(grpc.StatusCode.DEADLINE_EXCEEDED, "", self.authority) from None
        finally:
            call.close()
        return getattr(service_pb2, f"{method}Response").FromString(b"" if found is None else found[0])

    def _call(self, method: str, question: Any, model: str | None) -> Call:
        message = question.SerializeToString()
        try:
            stream = self._connected().request(self._block(method), _PREFIX.pack(False, len(message)) + message)
        except OSError as error:
            raise grpc_wire.cannot_reach(self.authority, error.strerror or str(error)) from None
        except Http2Error as error:
            raise grpc_wire.cannot_reach(self.authority, str(error)) from None
        return Call(stream, self.authority, model)

    def _block(self, method: str) -> bytes:
        if method not in self._blocks:
            headers = [
                (":method", "POST"),
                (":scheme", "https" if self._address.tls else "http"),
                (":path", _SERVICE + method),
                (":authority", self.authority),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                ("user-agent", "stillhouse-loadtest"),
            ]
            self._blocks[method] = header_block(headers)
        return self._blocks[method]

    def _connected(self) -> Connection:
        """A connection that has room for one more stream, or a new one. Raises OSError."""
        asked_s = time.perf_counter()
        standing = self._standing()
        if standing is not None:
            return standing
        with self._connecting:
            if self._failed is not None and self._failed[0] > asked_s:
                raise self._failed[1]  # it was tried while this greenlet waited
            standing = self._standing()
            if standing is not None:
                return standing
            try:
                made = Connection(_connect(self._address, self._connect_timeout_s))
            except OSError as error:
                self._failed = time.perf_counter(), error
                raise
            self._connections = [one for one in self._connections if not one.closed] + [made]
            return made

    def _standing(self) -> Connection | None:
        return next((one for one in self._connections if one.has_room), None)


def _connect(address: Address, timeout_s: float) -> Any:
    """A socket of gevent's, connected. Raises OSError."""
    host = address.host.strip("[]")
    sock = gevent.socket.create_connection((host, address.port), timeout=timeout_s)
    sock.setsockopt(gevent.socket.IPPROTO_TCP, gevent.socket.TCP_NODELAY, 1)
    if address.tls:
        context = gevent.ssl.create_default_context()
        context.set_alpn_protocols(["h2"])
        sock = context.wrap_socket(sock, server_hostname=host)
    sock.settimeout(None)
    return sock


class Call:
    """A call that was sent: the messages of its answer."""

    def __init__(self, stream: Stream, authority: str, model: str | None) -> None:
        self._stream = stream
        self._authority = authority
        self._model = model
        self._data = b""
        self._messages: deque[tuple[bytes, float]] = deque()
        self._headers: dict[str, str] = {}
        self._ended = False

    def next(self, wait_s: float | None) -> tuple[bytes, float] | None:
        """The next message and when it was read; None at the end. Raises TimeoutError, ClientError."""
        while not self._messages:
            if self._ended:
                self._check_status()
                return None
            try:
                self._take(self._stream.next(wait_s))
            except Http2Error as error:
                raise grpc_wire.cannot_reach(self._authority, str(error)) from None
        return self._messages.popleft()

    def close(self) -> None:
        """Cancels what still runs."""
        self._stream.cancel()

    def _take(self, arrived: Arrived) -> None:
        self._headers.update(arrived.headers or ())
        self._ended = arrived.ended
        data, at = self._data + arrived.data, 0
        while len(data) - at >= _PREFIX.size:
            _, size = _PREFIX.unpack_from(data, at)
            begin = at + _PREFIX.size
            if len(data) - begin < size:
                break
            at = begin + size
            self._messages.append((data[begin:at], arrived.time_s))
        self._data = data[at:]

    def _check_status(self) -> None:
        """Raises ClientError for what did not end well."""
        code = self._headers.get("grpc-status", "")
        if code == "0":
            return
        details = unquote(self._headers.get("grpc-message", ""))
        if not code:
            details = f"HTTP status {self._headers.get(':status')}, and no status of gRPC's"
        status = _STATUSES.get(int(code) if code.isdecimal() else -1, grpc.StatusCode.UNKNOWN)
        raise grpc_wire.error_of(status, details, self._authority, self._model)


class GrpcStream:
    """The replies of one request."""

    def __init__(self, call: Call, request: Request) -> None:
        self._call = call
        self._request = request
        self._replies: deque[Reply] = deque()

    def next(self, wait_s: float | None) -> Reply | None:
        """The next reply; None at the end. Raises TimeoutError after `wait_s`, ClientError where it broke."""
        while not self._replies:
            found = self._call.next(wait_s)
            if found is None:
                return None
            message, received_s = found
            response = service_pb2.ModelStreamInferResponse.FromString(message)
            self._replies.extend(grpc_wire.read_response(response, self._request, received_s))
        return self._replies.popleft()

    def close(self) -> None:
        """Cancels what still runs; the server sees it within milliseconds."""
        self._call.close()
