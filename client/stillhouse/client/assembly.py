"""From the replies of a stream to tokens and a completion, and how long to wait for the next."""

from __future__ import annotations

import time

from stillhouse.client.errors import ClientError, InvalidCall, StreamBroken, TimedOut
from stillhouse.client.request import Limits
from stillhouse.client.types import Completion, Reply, Request, Token


class Assembly:
    """One answer as it comes; knows nothing of the transport. Its clock runs from `start`."""

    def __init__(self, request: Request, limits: Limits) -> None:
        self._request = request
        self._limits = limits
        self._started_s = time.perf_counter()
        self._texts: list[str] = []
        self._last: Token | None = None
        self._first_s: float | None = None
        self._ended = False
        self._names_its_end = False

    def start(self) -> None:
        self._started_s = time.perf_counter()

    def wait_s(self) -> float | None:
        """How long the next reply may take from now on: never below 0, None for ever."""
        now = time.perf_counter()
        ends = []
        if self._limits.total_s is not None:
            ends.append(self._started_s + self._limits.total_s)
        if self._limits.token_s is not None and self._last is not None:
            # From now, not from the last token: the reader of the stream may have taken its time.
            ends.append(now + self._limits.token_s)
        return max(0.0, min(ends) - now) if ends else None

    def add(self, reply: Reply) -> Token | None:
        """The token of a reply; None for the bare end marker."""
        if reply.ends:
            self._ended = True
            return None
        self._names_its_end |= reply.has_finish_reason
        before = self._last
        count = reply.num_output_tokens
        if count is not None and before is not None:
            count += before.num_output_tokens or 0
        token = Token(
            text=reply.text,
            index=0 if before is None else before.index + 1,
            time_s=reply.received_s - self._started_s,
            finish_reason=reply.finish_reason,
            num_input_tokens=reply.num_input_tokens,
            num_output_tokens=count,
            cumulative_logprob=reply.cumulative_logprob,
            details=reply.details,
        )
        if self._first_s is None:
            self._first_s = token.time_s
        self._texts.append(token.text)
        self._last = token
        return token

    def finish(self) -> None:
        """Called when the transport has no more replies. Raises StreamBroken where the answer has no end."""
        if self._last is None:
            raise StreamBroken(f"{self._request.model}: the server ended the stream without an answer")
        # A model without the output finish_reason ends when its stream does.
        if self._names_its_end and not self._ended and self._last.finish_reason is None:
            raise StreamBroken(
                f"{self._request.model}: the stream ended after {self._received()}, before the answer's end",
                hint="the server may have gone down; ask again",
            )

    def completion(self) -> Completion:
        """The whole answer, after `finish`."""
        if self._last is None:
            raise InvalidCall("no answer was received")
        last = self._last
        return Completion(
            text="".join(self._texts),
            finish_reason=last.finish_reason,
            num_input_tokens=last.num_input_tokens,
            num_output_tokens=last.num_output_tokens,
            cumulative_logprob=last.cumulative_logprob,
            ttft_s=self._first_s if self._request.stream else None,
            e2e_s=last.time_s,
        )

    def timed_out(self) -> TimedOut:
        """The error for a wait that was longer than `wait_s`."""
        total_s, token_s = self._limits.total_s, self._limits.token_s
        spent_s = time.perf_counter() - self._started_s
        model = self._request.model
        if total_s is not None and spent_s >= total_s - 0.005:
            what = f"the answer took longer than {total_s:g} s ({self._received()} came)"
            return TimedOut(f"{model}: {what}", hint="raise timeout_s, or ask for fewer tokens")
        return TimedOut(
            f"{model}: no further token for {token_s:g} s after {self._received()}",
            hint="the model's process may have died while its server lives; look at the server's log",
        )

    def broken(self, error: ClientError) -> ClientError:
        """A transport's error, as it is before the first token; afterwards it broke the stream."""
        if self._last is None or isinstance(error, (TimedOut, StreamBroken)):
            return error
        return StreamBroken(f"the stream broke after {self._received()}: {error}", hint=error.hint, kind=error.kind)

    def _received(self) -> str:
        if self._last is None:
            return "nothing"
        count = self._last.num_output_tokens
        return f"{self._last.index + 1} responses" if count is None else f"{count} tokens"
