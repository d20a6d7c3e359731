"""The transport of `Client` over gRPC: one stream a request, read by a thread of its own."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from stillhouse.client import grpc_wire
from stillhouse.client.address import Address
from stillhouse.client.errors import ClientError
from stillhouse.client.types import ModelEntry, Reply, Request


class GrpcTransport:
    """A channel to one server. Threads may share it."""

    def __init__(self, address: Address, connect_timeout_s: float) -> None:
        self._authority = address.authority
        self._connect_timeout_s = connect_timeout_s
        if address.tls:
            credentials = grpc.ssl_channel_credentials()
            self._channel = grpc.secure_channel(address.authority, credentials, grpc_wire.CHANNEL_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(address.authority, grpc_wire.CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def open(self, request: Request) -> GrpcStream:
        # An open stream pins every version that it ever used (Triton): one stream a request, half-closed at once.
        message = grpc_wire.write_request(request)
        try:
            call = self._stub.ModelStreamInfer(iter([message]))
        except ValueError:  # grpc's word for a closed channel
            raise grpc_wire.closed(self._authority) from None
        return GrpcStream(call, request, self._authority)

    def models(self) -> list[ModelEntry]:
        response = self._ask(self._stub.RepositoryIndex, service_pb2.RepositoryIndexRequest())
        return grpc_wire.read_index(response)

    def ready(self, model: str, version: str) -> bool:
        if not model:
            return bool(self._ask(self._stub.ServerReady, service_pb2.ServerReadyRequest()).ready)
        message = service_pb2.ModelReadyRequest(name=model, version=version)
        return bool(self._ask(self._stub.ModelReady, message, model).ready)

    def close(self) -> None:
        self._channel.close()

    def _ask(self, method: Any, message: Any, model: str | None = None) -> Any:
        try:
            return method(message, timeout=self._connect_timeout_s)
        except grpc.RpcError as error:
            raise grpc_wire.read_error(error, self._authority, model) from None
        except ValueError:  # grpc's word for a closed channel
            raise grpc_wire.closed(self._authority) from None


class GrpcStream:
    """The replies of one request. `next` may wait with a limit, which grpc's own iterator cannot."""

    def __init__(self, call: Any, request: Request, authority: str) -> None:
        self._call = call
        self._request = request
        self._authority = authority
        self._replies: queue.SimpleQueue[Reply | ClientError | None] = queue.SimpleQueue()
        self._answered = False
        self._reader = threading.Thread(target=self._read, name="stillhouse-client-stream", daemon=True)
        self._reader.start()

    def next(self, wait_s: float | None) -> Reply | None:
        """The next reply; None at the end. Raises TimeoutError after `wait_s`, ClientError where it broke."""
        try:
            item = self._replies.get(timeout=wait_s)
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(item, ClientError):
            raise item
        return item

    def close(self) -> None:
        """Cancels what still runs; the server sees it within milliseconds. What has been answered runs out."""
        if self._answered:
            self._reader.join(grpc_wire.END_S)
        self._call.cancel()

    def _read(self) -> None:
        try:
            for message in self._call:
                replies = grpc_wire.read_response(message, self._request)
                self._answered |= grpc_wire.is_last(replies)
                for reply in replies:
                    self._replies.put(reply)
        except ClientError as error:
            self._answered = True
            self._replies.put(error)
            with contextlib.suppress(grpc.RpcError):
                for _ in self._call:
                    pass
        except grpc.RpcError as error:
            self._replies.put(grpc_wire.read_error(error, self._authority, self._request.model))
        except Exception as error:  # the boundary of a thread: whoever waits for its replies hears of it
            self._replies.put(grpc_wire.unreadable(self._request.model, error))
        finally:
            self._replies.put(None)
