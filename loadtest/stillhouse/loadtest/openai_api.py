"""The OpenAI API as a load test asks it: chat completions and completions in server-sent events, on urllib3.

Only what every such server has is relied on; tokens are those of the server's own usage
(`stream_options.include_usage`), which comes with the last event. https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError, IncompleteRead, InvalidChunkLength, NewConnectionError, ReadTimeoutError

from stillhouse.client import (
    ClientError,
    ConnectionFailed,
    ModelNotFound,
    Overloaded,
    RequestRejected,
    StreamBroken,
    TimedOut,
    Unavailable,
)
from stillhouse.client.http_sync import limit_wait
from stillhouse.client.http_wire import EventReader, first_line
from stillhouse.client.request import Limits
from stillhouse.loadtest.errors import KeyRefused, WrongContent
from stillhouse.loadtest.pieces import Piece

_CONNECT_S = 10.0
_IDLE_CONNECTIONS = 1000
_NEARLY_S = 0.005  # a wait may end so much before its time
_STATUSES: dict[int, type[ClientError]] = {
    401: KeyRefused,
    403: KeyRefused,
    404: ModelNotFound,
    429: Overloaded,
    501: RequestRejected,
    503: Overloaded,
}


class OpenAiClient:
    """A server's models over the OpenAI API, at `base_url` (mostly …/v1). Greenlets and threads may share one.

    The limits are those of stillhouse.client.Client: `timeout_s` is for a whole answer, and so for its first token too,
    `token_timeout_s` for the wait between two tokens.
    """

    def __init__(
        self, base_url: str, api_key: str = "", token_timeout_s: float = 30.0, timeout_s: float = 300.0
    ) -> None:
        self._base_url = base_url.rstrip("/")
        Limits(timeout_s, token_timeout_s)  # refuses what is no limit
        self._timeout_s, self._token_timeout_s = timeout_s, token_timeout_s
        self._pool = urllib3.PoolManager(maxsize=_IDLE_CONNECTIONS, retries=False)
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def models(self) -> list[str]:
        """The names of the server's models. Raises ClientError."""
        try:
            response = self._pool.request("GET", f"{self._base_url}/models", headers=self._headers, timeout=_CONNECT_S)
        except HTTPError as error:
            raise self._failure(error) from None
        if response.status != 200:
            raise _refusal(response.status, response.data, self._base_url)
        try:
            return [str(entry["id"]) for entry in json.loads(response.data)["data"]]
        except (ValueError, KeyError, TypeError):
            raise WrongContent(f"{self._base_url}/models: not a list of models: {response.data[:80]!r}") from None

    def ready(self) -> bool:
        """Whether it answers at all."""
        try:
            self.models()
        except RequestRejected:
            return True  # not every server lists its models
        except ClientError:
            return False
        return True

    def stream(self, body: dict[str, Any]) -> Iterator[Piece]:
        """The answer to a request's body, which has `messages` or a `prompt`. Raises ClientError."""
        path = "chat/completions" if "messages" in body else "completions"
        streams = bool(body.get("stream"))
        clock = _Clock(self._timeout_s, self._token_timeout_s)
        response, ended = None, False
        try:
            timeout = urllib3.Timeout(connect=_CONNECT_S, read=self._timeout_s)
            response = self._pool.request(
                "POST",
                f"{self._base_url}/{path}",
                body=json.dumps(body, ensure_ascii=False).encode(),
                headers=self._headers,
                timeout=timeout,
                preload_content=False,
            )
            if response.status != 200:
                raise _refusal(response.status, response.read(), str(body["model"]))
            if not streams:
                yield _whole(response.read(), clock.passed_s())
                ended = True
                return
            for data in _events(response, clock):
                now_s = clock.passed_s()
                if data == b"[DONE]":
                    ended = True
                    continue
                piece, finished = _read_event(data, now_s)
                ended |= finished
                clock.received += piece.carries_token
                yield piece
            if not ended:
                raise StreamBroken(f"the stream ended after {clock.received} responses, before the answer's end")
        except ReadTimeoutError:
            raise clock.timed_out() from None
        except (HTTPError, OSError) as error:
            broken = response is not None or isinstance(error, (IncompleteRead, InvalidChunkLength))
            if broken:
                raise StreamBroken(f"the stream broke after {clock.received} responses: {error}") from None
            raise self._failure(error) from None
        finally:
            if response is not None:
                # Closing what still runs cancels it on the server; what ended is given back for the next request.
                if ended:
                    response.release_conn()
                else:
                    response.close()

    def close(self) -> None:
        self._pool.clear()

    def _failure(self, error: Exception) -> ClientError:
        reason = error.__cause__ or error if isinstance(error, NewConnectionError) else error
        return ConnectionFailed(
            f"cannot reach {self._base_url}: {reason}", hint="is the server started, and is this its port?"
        )


class _Clock:
    """The time of one answer, and how much more it has."""

    def __init__(self, timeout_s: float, token_timeout_s: float) -> None:
        self._timeout_s, self._token_timeout_s = timeout_s, token_timeout_s
        self._started_s = time.perf_counter()
        self.received = 0  # responses with tokens

    def passed_s(self) -> float:
        return time.perf_counter() - self._started_s

    def wait_s(self) -> float:
        """How long the next bytes may take from now on."""
        rest_s = max(0.0, self._timeout_s - self.passed_s())
        return min(rest_s, self._token_timeout_s) if self.received else rest_s

    def timed_out(self) -> TimedOut:
        if self.passed_s() > self._timeout_s - _NEARLY_S:
            what = f"the answer took longer than {self._timeout_s:g} s ({self.received} responses came)"
            return TimedOut(what, hint="give it more time (--timeout), or ask for fewer tokens")
        return TimedOut(f"no further token for {self._token_timeout_s:g} s after {self.received} responses")


def _events(response: urllib3.BaseHTTPResponse, clock: _Clock) -> Iterator[bytes]:
    """The data of each event."""
    kind = response.headers.get("Content-Type", "")
    if "event-stream" not in kind:
        raise WrongContent(f"a stream of events was asked for, the answer is {kind or 'without a type'}")
    reader = EventReader()
    chunked = isinstance(response, urllib3.HTTPResponse) and response.chunked
    pieces = response.read_chunked() if chunked else iter(lambda: response.read1(1 << 16), b"")
    while True:
        limit_wait(response, clock.wait_s())
        piece = next(pieces, None)
        if piece is None:
            return
        yield from reader.feed(piece)


def _read_event(data: bytes, now_s: float) -> tuple[Piece, bool]:
    """The piece in one event, and whether it is the answer's last. Raises ClientError where it is an error."""
    try:
        value = json.loads(data)
        if value.get("error"):
            raise RequestRejected(_message(value, data))
        choices = value["choices"]
        choice = choices[0] if choices else {}
        delta = choice.get("delta") or {}
        thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
        text = delta.get("content") or choice.get("text") or ""
        usage = value.get("usage") or {}
        piece = Piece(
            text=text or thought,
            time_s=now_s,
            thought=bool(thought and not text),
            carries_token=bool(text or thought or delta.get("tool_calls")),
            num_input_tokens=usage.get("prompt_tokens"),
            num_output_tokens=usage.get("completion_tokens"),
        )
        return _checked(piece), choice.get("finish_reason") is not None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise WrongContent(f"an event is not a completion's: {data[:80]!r}") from None


def _whole(data: bytes, now_s: float) -> Piece:
    try:
        value = json.loads(data)
        choice = value["choices"][0]
        text = choice["message"].get("content") if "message" in choice else choice["text"]
        usage = value.get("usage") or {}
        counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
        return _checked(Piece(text or "", now_s, False, True, *counts))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise WrongContent(f"the answer is not a completion: {data[:80]!r}") from None


def _checked(piece: Piece) -> Piece:
    """The same, once its fields are what they say: a text in parts, or a count in letters, is another protocol's."""
    counts = (piece.num_input_tokens, piece.num_output_tokens)
    if not isinstance(piece.text, str) or not all(count is None or isinstance(count, int) for count in counts):
        raise TypeError
    return piece


def _refusal(status: int, body: bytes, where: str) -> ClientError:
    kind = _STATUSES.get(status, Unavailable if status >= 500 else RequestRejected)
    try:
        message = _message(json.loads(body), body)
    except ValueError:
        message = first_line(body)
    hint = "give the server's key with --api-key or in OPENAI_API_KEY" if kind is KeyRefused else None
    return kind(f"{where}: HTTP status {status}: {message}", hint=hint)


def _message(value: Any, body: bytes) -> str:
    error = value.get("error", value) if isinstance(value, dict) else value
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or first_line(body))
