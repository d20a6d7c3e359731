"""The transport of `AsyncClient` over gRPC: one stream a request."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from stillhouse.client import grpc_wire
from stillhouse.client.address import Address
from stillhouse.client.errors import ClientError
from stillhouse.client.types import ModelEntry, Reply, Request


class GrpcTransport:
    """A channel to one server; made inside the event loop that uses it."""

    def __init__(self, address: Address, connect_timeout_s: float) -> None:
        self._authority = address.authority
        self._connect_timeout_s = connect_timeout_s
        if address.tls:
            credentials = grpc.ssl_channel_credentials()
            self._channel = grpc.aio.secure_channel(address.authority, credentials, options=grpc_wire.CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(address.authority, options=grpc_wire.CHANNEL_OPTIONS)
        self._closed = False
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def open(self, request: Request) -> GrpcStream:
        # An open stream pins every version that it ever used (Triton): one stream a request, half-closed at once.
        message = grpc_wire.write_request(request)
        call = self._stub.ModelStreamInfer(iter([message]))
        return GrpcStream(self, call, request)

    async def models(self) -> list[ModelEntry]:
        response = await self._ask(self._stub.RepositoryIndex, service_pb2.RepositoryIndexRequest())
        return grpc_wire.read_index(response)

    async def ready(self, model: str, version: str) -> bool:
        if not model:
            return bool((await self._ask(self._stub.ServerReady, service_pb2.ServerReadyRequest())).ready)
        message = service_pb2.ModelReadyRequest(name=model, version=version)
        return bool((await self._ask(self._stub.ModelReady, message, model)).ready)

    async def close(self) -> None:
        self._closed = True
        await self._channel.close()

    def failure(self, error: BaseException, model: str | None = None) -> BaseException:
        """What to raise for an error of grpc's. It ends a closed channel's calls as if their tasks were cancelled."""
        if isinstance(error, grpc.RpcError):
            return grpc_wire.read_error(error, self._authority, model)
        return grpc_wire.closed_meanwhile(self._authority) if self._closed and not _task_is_cancelled() else error

    async def _ask(self, method: Any, message: Any, model: str | None = None) -> Any:
        try:
            return await method(message, timeout=self._connect_timeout_s)
        except (grpc.RpcError, asyncio.CancelledError) as error:
            raise self.failure(error, model) from None


class GrpcStream:
    """The replies of one request."""

    def __init__(self, transport: GrpcTransport, call: Any, request: Request) -> None:
        self._transport = transport
        self._call = call
        self._request = request
        self._replies: deque[Reply] = deque()
        self._answered = False

    async def next(self, wait_s: float | None) -> Reply | None:
        """The next reply; None at the end. Raises TimeoutError after `wait_s`, ClientError where it broke."""
        while not self._replies:
            try:
                message = await asyncio.wait_for(self._call.read(), wait_s)
            except asyncio.TimeoutError:
                raise TimeoutError from None
            except (grpc.RpcError, asyncio.CancelledError) as error:
                raise self._transport.failure(error, self._request.model) from None
            if message is grpc.aio.EOF:
                return None
            try:
                self._replies.extend(grpc_wire.read_response(message, self._request))
            except ClientError:
                self._answered = True
                raise
            self._answered |= grpc_wire.is_last(self._replies)
        return self._replies.popleft()

    async def close(self) -> None:
        """Cancels what still runs; the server sees it within milliseconds. What has been answered runs out."""
        if self._answered:
            with contextlib.suppress(asyncio.TimeoutError, grpc.RpcError):
                await asyncio.wait_for(self._run_out(), grpc_wire.END_S)
        self._call.cancel()

    async def _run_out(self) -> None:
        while await self._call.read() is not grpc.aio.EOF:
            pass


def _task_is_cancelled() -> bool:
    """Whether this task itself was asked to end; Python 3.10 cannot tell."""
    cancelling = getattr(asyncio.current_task(), "cancelling", None)
    return cancelling is not None and bool(cancelling())
