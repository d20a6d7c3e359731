"""The client for asyncio: the same calls, awaited."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from stillhouse.client.address import Address, parse_url
from stillhouse.client.assembly import Assembly
from stillhouse.client.errors import ClientError, ConnectionFailed, TimedOut
from stillhouse.client.request import UNSET, Limits, Unset, build_request, choose_limits
from stillhouse.client.types import Completion, Message, ModelEntry, Request, Token

if TYPE_CHECKING:
    from stillhouse.client.grpc_aio import GrpcTransport
    from stillhouse.client.http_aio import HttpTransport


class AsyncClient:
    """A server's language models, over gRPC (`host:port`, `grpc://host:port`) or HTTP (`http://host:port`).

    The calls, limits and errors are those of `Client`. Its connections belong to the event loop of the first call;
    close it with `await client.close()`, or use it in an `async with` block.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float | None = 300.0,
        token_timeout_s: float | None = 30.0,
        connect_timeout_s: float = 10.0,
    ) -> None:
        self.address = parse_url(url)
        self._limits = Limits(timeout_s, token_timeout_s)
        self._connect_timeout_s = connect_timeout_s
        self._opened: GrpcTransport | HttpTransport | None = None

    async def generate(
        self,
        model: str,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        input_ids: Sequence[int] | None = None,
        version: str | int | None = None,
        timeout_s: float | Unset | None = UNSET,
        model_inputs: Collection[str] | None = None,
        **sampling: Any,
    ) -> Completion:
        """The whole answer, sent in one piece; arguments as in `Client.generate`. Raises ClientError."""
        request = build_request(
            model, prompt, messages, input_ids, version, sampling, stream=False, model_inputs=model_inputs
        )
        assembly = Assembly(request, choose_limits(self._limits, timeout_s, UNSET))
        async for _ in self._tokens(request, assembly):
            pass
        return assembly.completion()

    def stream(
        self,
        model: str,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        input_ids: Sequence[int] | None = None,
        version: str | int | None = None,
        timeout_s: float | Unset | None = UNSET,
        token_timeout_s: float | Unset | None = UNSET,
        details: bool = False,
        model_inputs: Collection[str] | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[Token, None]:
        """The answer as it comes, without the prompt; arguments as in `Client.generate`.

        `details`: each token brings what a stillhouse server tells of it (ids, log-probabilities, thinking tokens).

        The request is sent, and its clock started, when the first token is asked for. `aclose()`, or cancelling the
        task, cancels the request on the server.
        """
        request = build_request(
            model,
            prompt,
            messages,
            input_ids,
            version,
            sampling,
            stream=True,
            details=details,
            model_inputs=model_inputs,
        )
        return self._tokens(request, Assembly(request, choose_limits(self._limits, timeout_s, token_timeout_s)))

    @overload
    async def chat(
        self, model: str, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Any
    ) -> Completion: ...

    @overload
    async def chat(
        self, model: str, messages: Sequence[Message], *, stream: Literal[True], **options: Any
    ) -> AsyncGenerator[Token, None]: ...

    async def chat(
        self, model: str, messages: Sequence[Message], *, stream: bool = False, **options: Any
    ) -> Completion | AsyncGenerator[Token, None]:
        """The next turn of a conversation: `generate`, or with `stream=True` `stream`, of `messages`."""
        if stream:
            return self.stream(model, messages=messages, **options)
        return await self.generate(model, messages=messages, **options)

    async def models(self) -> list[ModelEntry]:
        """The models and versions in the server's repository. Raises ClientError."""
        return await self._transport().models()

    async def ready(self, model: str = "", version: str | int = "") -> bool:
        """Whether the server, or one model of it, says that it is ready; see `Client.ready`."""
        try:
            return await self._transport().ready(model, str(version))
        except (ConnectionFailed, TimedOut):
            return False

    async def close(self) -> None:
        """Closes the connections; streams that still run end with ConnectionFailed or StreamBroken."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            await opened.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _tokens(self, request: Request, assembly: Assembly) -> AsyncGenerator[Token, None]:
        assembly.start()
        source = await self._transport().open(request)
        try:
            while True:
                try:
                    reply = await source.next(assembly.wait_s())
                except TimeoutError:
                    raise assembly.timed_out() from None
                except ClientError as error:
                    raise assembly.broken(error) from None
                if reply is None:
                    break
                token = assembly.add(reply)
                if token is not None:
                    yield token
            assembly.finish()
        finally:
            await source.close()

    def _transport(self) -> GrpcTransport | HttpTransport:
        if self._opened is None:
            self._opened = _open_transport(self.address, self._connect_timeout_s)
        return self._opened


def _open_transport(address: Address, connect_timeout_s: float) -> GrpcTransport | HttpTransport:
    # Imported here, so that grpc is loaded by those alone who use it.
    if address.is_grpc:
        from stillhouse.client.grpc_aio import GrpcTransport

        return GrpcTransport(address, connect_timeout_s)
    from stillhouse.client.http_aio import HttpTransport

    return HttpTransport(address, connect_timeout_s)
