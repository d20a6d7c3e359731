"""One OpenAI-compatible endpoint: a chat answer in a JSON schema, tried again where that can help."""

from __future__ import annotations

import logging
import os
import random
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.data_recipe import Synthetic

log = logging.getLogger(__name__)

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said and how many tokens the endpoint counted; 0 where it does not count.

    `cut`: it was not at its end at max_tokens. `again`: how often it was asked again; tokens are those of all tries.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    cut: bool = False
    again: int = 0


class Stopped(StillhouseError):
    """Not asked, for another request has failed for good."""


class Endpoint:
    """POSTs to `url`/chat/completions; safe from several threads. A context manager."""

    def __init__(self, options: Synthetic, transport: httpx.BaseTransport | None = None) -> None:
        key = os.environ.get(options.api_key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._options = options
        self._url = options.url.rstrip("/") + "/chat/completions"
        self._client = httpx.Client(timeout=options.timeout_s, headers=headers, transport=transport)
        self._stopped = threading.Event()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._client.close()

    def stop(self) -> None:
        """Ends every request but those under way, which are not tried again."""
        self._stopped.set()

    def ask(self, prompt: str, schema: dict[str, Any] | None, seed: int) -> Answer:
        """The answer to `prompt`, held to `schema` by the server where there is one.

        Raises StillhouseError where the endpoint refuses the request, or does not answer in so many tries; from then on
        every other request raises Stopped.
        """
        options = self._options
        messages = [{"role": "system", "content": options.system}] if options.system else []
        body: dict[str, Any] = {
            "model": options.model,
            "messages": [*messages, {"role": "user", "content": prompt}],
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
            "seed": seed,
        }
        if schema is not None:
            held = {"name": "record", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": held}
        reason = ""
        for attempt in range(options.attempts):
            if self._stopped.is_set():
                raise Stopped("synthetic: stopped", hint="another request failed")
            pause_s = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
            try:
                response = self._client.post(self._url, json=body)
                if response.status_code == 200:
                    return _answer(response)
                reason = f"status {response.status_code}: {_message(response)}"
                if response.status_code not in _AGAIN:
                    self.stop()
                    raise StillhouseError(
                        f"synthetic: {self._url} refuses the request: {reason}",
                        hint=f"check url, model and the key in ${options.api_key_env}"
                        + ("" if schema is None else "; json_schema = false for a server that knows no schemas"),
                    )
                pause_s = max(pause_s, _asked_pause(response))
            except (httpx.TransportError, ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
            log.debug("synthetic: try %d of %d failed (%s)", attempt + 1, options.attempts, reason)
            if attempt + 1 < options.attempts:
                self._stopped.wait(pause_s)
        self.stop()
        raise StillhouseError(
            f"synthetic: no answer from {self._url} in {options.attempts} tries: {reason}",
            hint="is the server up? what was answered until now is kept: run it again",
        )


def _answer(response: httpx.Response) -> Answer:
    body = response.json()
    usage = body.get("usage") or {}
    choice = body["choices"][0]
    text, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
    if text is None and cut:  # all of it was spent on a thought
        text = ""
    if not isinstance(text, str):
        raise ValueError("an answer without text")
    return Answer(text, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0), cut)


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return " ".join(response.text.split())[:200]


def _asked_pause(response: httpx.Response) -> float:
    """Seconds of a Retry-After header; dates are not read."""
    value = response.headers.get("retry-after", "")
    return min(float(value), _LONGEST_PAUSE_S) if value.isdecimal() else 0.0
