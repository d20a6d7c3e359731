"""The client for plain Python."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol, overload

from stillhouse.client.address import Address, parse_url
from stillhouse.client.assembly import Assembly
from stillhouse.client.errors import ClientError, ConnectionFailed, TimedOut
from stillhouse.client.request import UNSET, Limits, Unset, build_request, choose_limits
from stillhouse.client.types import Completion, Message, ModelEntry, Reply, Request, Token


class Stream(Protocol):
    """The replies of one request."""

    def next(self, wait_s: float | None) -> Reply | None:
        """The next reply; None at the end. Raises TimeoutError after `wait_s`, ClientError where it broke."""

    def close(self) -> None:
        """Cancels what still runs."""


class Transport(Protocol):
    """How a client's questions reach a server. Everything raises ClientError."""

    def open(self, request: Request) -> Stream: ...

    def models(self) -> list[ModelEntry]: ...

    def ready(self, model: str, version: str) -> bool: ...

    def close(self) -> None: ...


class Client:
    """A server's language models, over gRPC (`host:port`, `grpc://host:port`) or HTTP (`http://host:port`).

    Nothing is sent before the first call; threads may share one client. Close it, or use it in a `with` block.

    `timeout_s` is for a whole answer, `token_timeout_s` for the wait between two tokens of a stream (when a model's
    process dies, its server sends neither error nor end); None is no limit. `connect_timeout_s` is for making
    a connection and for the short questions (`models`, `ready`). `transport` takes the place of the URL's own.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float | None = 300.0,
        token_timeout_s: float | None = 30.0,
        connect_timeout_s: float = 10.0,
        transport: Transport | None = None,
    ) -> None:
        self.address = parse_url(url)
        self._limits = Limits(timeout_s, token_timeout_s)
        self._transport = transport or _open_transport(self.address, connect_timeout_s)

    def generate(
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
        """The whole answer, sent in one piece (so `ttft_s` is None; `stream` knows it).

        Exactly one of `prompt`, `messages` (OpenAI's form, through the model's chat template) and `input_ids` is
        given. `sampling` goes to the server as it is, in vLLM's words: max_tokens, temperature, top_p, seed, stop …;
        the server's defaults are vLLM's (16 tokens, temperature 1). `model_inputs` are the inputs that the model has,
        where it has not all of the contract's: the `return_…` among them alone are asked for. Raises ClientError.
        """
        request = build_request(
            model, prompt, messages, input_ids, version, sampling, stream=False, model_inputs=model_inputs
        )
        assembly = Assembly(request, choose_limits(self._limits, timeout_s, UNSET))
        for _ in self._tokens(request, assembly):
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
        model_inputs: Collection[str] | None = None,
        **sampling: Any,
    ) -> Generator[Token, None, None]:
        """The answer as it comes, without the prompt; arguments as in `generate`.

        The request is sent, and its clock started, when the first token is asked for. Closing the iterator (or
        leaving it to the garbage collector) cancels the request on the server.
        """
        request = build_request(
            model, prompt, messages, input_ids, version, sampling, stream=True, model_inputs=model_inputs
        )
        return self._tokens(request, Assembly(request, choose_limits(self._limits, timeout_s, token_timeout_s)))

    @overload
    def chat(
        self, model: str, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Any
    ) -> Completion: ...

    @overload
    def chat(
        self, model: str, messages: Sequence[Message], *, stream: Literal[True], **options: Any
    ) -> Generator[Token, None, None]: ...

    def chat(
        self, model: str, messages: Sequence[Message], *, stream: bool = False, **options: Any
    ) -> Completion | Generator[Token, None, None]:
        """The next turn of a conversation: `generate`, or with `stream=True` `stream`, of `messages`."""
        if stream:
            return self.stream(model, messages=messages, **options)
        return self.generate(model, messages=messages, **options)

    def models(self) -> list[ModelEntry]:
        """The models and versions in the server's repository. Raises ClientError."""
        return self._transport.models()

    def ready(self, model: str = "", version: str | int = "") -> bool:
        """Whether the server, or one model of it, says that it is ready; False also where nobody listens.

        Triton says so even while a model's process is dead: only an answer proves that it can answer.
        """
        try:
            return self._transport.ready(model, str(version))
        except (ConnectionFailed, TimedOut):
            return False

    def close(self) -> None:
        """Closes the connections.

        Streams that still run end with ConnectionFailed or StreamBroken; over HTTP they keep their own and go on.
        """
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tokens(self, request: Request, assembly: Assembly) -> Generator[Token, None, None]:
        assembly.start()
        source = self._transport.open(request)
        try:
            while True:
                try:
                    reply = source.next(assembly.wait_s())
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
            source.close()


def _open_transport(address: Address, connect_timeout_s: float) -> Transport:
    # Imported here, so that grpc is loaded by those alone who use it.
    if address.is_grpc:
        from stillhouse.client.grpc_sync import GrpcTransport

        return GrpcTransport(address, connect_timeout_s)
    from stillhouse.client.http_sync import HttpTransport

    return HttpTransport(address, connect_timeout_s)
