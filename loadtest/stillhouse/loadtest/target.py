"""Who is asked, and how: Triton over gRPC or HTTP, or the OpenAI API, by the host's form or by name.

`host:port` and `grpc://` are gRPC. An `http://` host is asked for /v2 first (Triton's protocol, KServe v2), then for
/v1 (the OpenAI API); one that ends in /v1 needs no question. An OpenAI API that is said to be one is asked at the path
that was given (…/v1beta/openai), at /v1 where none was.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import urllib3
from urllib3.exceptions import HTTPError

from stillhouse.client import Client, ClientError, ConnectionFailed, Overloaded, RequestRejected, TimedOut, Token
from stillhouse.client.address import parse_url
from stillhouse.loadtest.errors import BadInput, KeyRefused
from stillhouse.loadtest.openai_api import OpenAiClient
from stillhouse.loadtest.pieces import Piece
from stillhouse.loadtest.prompts import Prompt

if TYPE_CHECKING:
    from stillhouse.loadtest.grpc_gevent import GreenletTransport

TRITON, OPENAI = "triton", "openai"
_ASK_S = 10.0

# The inputs of a Triton model, by host, model and version: many targets share a host. None: not known, so all of them.
_inputs: dict[tuple[str, str, str], set[str] | None] = {}


class Target(Protocol):
    """A server that streams answers."""

    def models(self) -> list[str]:
        """The models that are ready. Raises ClientError."""

    def ready(self) -> bool:
        """Whether it answers at all; connects, so that a first request need not. Raises nothing."""

    def prepare(self, model: str, version: str) -> None:
        """Finds out what `ask` must know of a model: once before a test, for no latency would contain it."""

    def ask(
        self, model: str, version: str, prompt: Prompt, sampling: dict[str, Any], *, stream: bool
    ) -> Iterator[Piece]:
        """One answer as it comes; its clock starts when the first piece is asked for. Raises ClientError."""

    def close(self) -> None:
        """Ends the connections."""


class TritonTarget:
    """Triton's vLLM contract, over gRPC or HTTP; a model that takes no `messages` (vLLM's own) is sent their texts."""

    def __init__(self, host: str, timeout_s: float, token_timeout_s: float) -> None:
        self._host = host
        transport = _greenlet_transport(host) if parse_url(host).is_grpc else None
        self.client = Client(host, timeout_s=timeout_s, token_timeout_s=token_timeout_s, transport=transport)

    def models(self) -> list[str]:
        return sorted({entry.name for entry in self.client.models() if entry.ready})

    def ready(self) -> bool:
        try:
            return self.client.ready()
        except RequestRejected:
            return True  # it does not know the question, but it is there
        except ClientError:
            return False

    def prepare(self, model: str, version: str) -> None:
        _inputs[self._host, model, version] = _input_names(self._host, model, version) or None

    def ask(
        self, model: str, version: str, prompt: Prompt, sampling: dict[str, Any], *, stream: bool
    ) -> Iterator[Piece]:
        if (self._host, model, version) not in _inputs:
            self.prepare(model, version)
        inputs = _inputs[self._host, model, version]
        if "messages" in prompt and inputs is not None and "messages" not in inputs:
            prompt = _as_text(prompt)
        arguments = {**prompt, **sampling}
        if stream:
            yield from _pieces(self.client.stream(model, version=version or None, model_inputs=inputs, **arguments))
            return
        answer = self.client.generate(model, version=version or None, model_inputs=inputs, **arguments)
        carries_token = bool(answer.text or answer.num_output_tokens)
        yield Piece(answer.text, answer.e2e_s, False, carries_token, answer.num_input_tokens, answer.num_output_tokens)

    def close(self) -> None:
        self.client.close()


class OpenAiTarget:
    """The OpenAI API at `base_url`: chat completions for messages, completions for a prompt."""

    def __init__(self, base_url: str, timeout_s: float, token_timeout_s: float, api_key: str) -> None:
        self.client = OpenAiClient(base_url, api_key, token_timeout_s, timeout_s)

    def models(self) -> list[str]:
        return self.client.models()

    def ready(self) -> bool:
        return self.client.ready()

    def prepare(self, model: str, version: str) -> None:
        """Nothing: every model takes messages."""

    def ask(
        self,
        model: str,
        version: str,  # noqa: ARG002 - this API knows none
        prompt: Prompt,
        sampling: dict[str, Any],
        *,
        stream: bool,
    ) -> Iterator[Piece]:
        body = {"model": model, **prompt, **sampling, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        return self.client.stream(body)

    def close(self) -> None:
        self.client.close()


def open_target(
    host: str, protocol: str = "", *, timeout_s: float = 300.0, token_timeout_s: float = 30.0, api_key: str = ""
) -> Target:
    """The target at `host`; `protocol` is TRITON, OPENAI, or "" to find out. Raises BadInput or ClientError."""
    protocol, host = resolve(host, protocol)
    if protocol == OPENAI:
        return OpenAiTarget(host, timeout_s, token_timeout_s, api_key)
    return TritonTarget(host, timeout_s, token_timeout_s)


def resolve(host: str, protocol: str = "") -> tuple[str, str]:
    """TRITON or OPENAI, and the host with it: of an OpenAI API the whole base URL. Raises BadInput or ClientError.

    What it gives, resolved again, stays the same, and nobody is asked.
    """
    found = protocol or find_protocol(host)
    if found != OPENAI:
        return found, host
    if not host.startswith(("http://", "https://")):
        raise BadInput(f"the OpenAI API is asked over http:// or https://, got {host!r}")
    base_url, path = host.rstrip("/"), parse_url(host).path
    whole = path.endswith("/v1") or (protocol and path)
    return found, base_url if whole else f"{base_url}/v1"


def find_protocol(host: str) -> str:
    """TRITON or OPENAI. Raises ConnectionFailed where nobody listens, BadInput where it is neither."""
    address = parse_url(host)
    if address.is_grpc:
        return TRITON
    if address.path.endswith("/v1"):
        return OPENAI
    base_url = address.base_url
    if _says_v2(base_url):
        return TRITON
    # Whoever wants a key answers 401; only 404 says that there is nothing.
    if _status(f"{base_url}/v1/models") != 404:
        return OPENAI
    if _status(f"{base_url}/v2/health/ready") == 200:
        return TRITON
    hint = "give a Triton server's HTTP port or an OpenAI API's /v1, or say what it is (--protocol triton or openai)"
    raise BadInput(f"{base_url} answers neither at /v2 (Triton) nor at /v1 (OpenAI)", hint=hint)


def choose_model(target: Target, wish: str) -> str:
    """`wish` if it is ready there; without a wish the first model ending in -int4, else the first.

    A server that cannot list its models is believed to have it. Raises BadInput or ClientError.
    """
    try:
        ready = target.models()
    except (ConnectionFailed, TimedOut, Overloaded, KeyRefused):
        raise
    except ClientError as error:
        if wish:
            return wish
        raise BadInput(f"this server does not list its models: {error}", hint="name one with --model") from None
    if not ready:
        raise BadInput("the server has no model that is ready", hint="look at its log")
    if not wish:
        return next((name for name in ready if name.endswith("-int4")), ready[0])
    if wish not in ready:
        raise BadInput(f"no model {wish!r} on this server", hint=f"ready there: {', '.join(ready)}")
    return wish


def _pieces(tokens: Generator[Token, None, None]) -> Iterator[Piece]:
    counted = 0
    try:
        for token in tokens:
            count = token.num_output_tokens
            # Some models end with a response that has neither text nor tokens.
            carries_token = bool(token.text) or (count or 0) > counted
            counted = count or 0
            yield Piece(token.text, token.time_s, False, carries_token, token.num_input_tokens, count)
    finally:
        tokens.close()  # cancels on the server what the test's end cut off


def _as_text(prompt: Prompt) -> Prompt:
    text = "\n\n".join(str(message.get("content", "")) for message in prompt["messages"])
    return {"prompt": text, **{name: value for name, value in prompt.items() if name != "messages"}}


def _input_names(host: str, model: str, version: str) -> set[str]:
    """The inputs of a Triton model, as its metadata has them; empty where it tells none."""
    address = parse_url(host)
    if not address.is_grpc:
        path = f"/v2/models/{quote(model, safe='')}" + (f"/versions/{version}" if version else "")
        try:
            response = urllib3.request("GET", address.base_url + path, timeout=_ASK_S, retries=False)
            return {str(entry["name"]) for entry in json.loads(response.data).get("inputs", [])}
        except (HTTPError, ValueError, TypeError, AttributeError, KeyError):
            return set()
    transport = _greenlet_transport(host)
    try:
        return transport.input_names(model, version)
    except ClientError:
        return set()
    finally:
        transport.close()


def _greenlet_transport(host: str) -> GreenletTransport:
    # Imported here, so that gevent and grpc are loaded by those alone who use them.
    from stillhouse.loadtest.grpc_gevent import GreenletTransport

    return GreenletTransport(parse_url(host), _ASK_S)


def _says_v2(base_url: str) -> bool:
    """Whether the server's metadata is KServe v2's: a JSON object with its extensions."""
    try:
        response = urllib3.request("GET", f"{base_url}/v2", timeout=_ASK_S, retries=False)
        value = json.loads(response.data) if response.status == 200 else None
    except HTTPError as error:
        raise _unreachable(base_url, error) from None
    except ValueError:
        return False
    return isinstance(value, dict) and "extensions" in value


def _status(url: str) -> int:
    try:
        return urllib3.request("GET", url, timeout=_ASK_S, retries=False).status
    except HTTPError as error:
        raise _unreachable(url, error) from None


def _unreachable(url: str, error: Exception) -> ConnectionFailed:
    return ConnectionFailed(
        f"cannot reach {url}: {error.__cause__ or error}", hint="is the server started, and is this its port?"
    )
