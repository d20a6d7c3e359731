"""A running Triton over gRPC: what is live, load, unload, and a question that only an answer passes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from stillhouse.client import Client, ConnectionFailed, Overloaded
from stillhouse.client.address import parse_url
from stillhouse.engine.errors import UsageError
from stillhouse.serve.errors import LoadHopeless, ServeError

_ANSWER_TIMEOUT_S = 60.0
_LOAD_TIMEOUT_S = 900.0
_LOOK_S = 0.2
_NOBODY = "start 'stillhouse serve', and run this again"


class TritonControl:
    """The server at a gRPC URL; nothing is sent before the first call.

    Over gRPC, since an HTTP worker of Triton's is held for as long as a load takes.
    """

    def __init__(self, url: str) -> None:
        address = parse_url(url)
        if not address.is_grpc:
            raise UsageError(f"models are loaded over gRPC, got {url}", hint="give its gRPC port: --url HOST:8001")
        self._url = address.base_url
        self._client = Client(url, timeout_s=_ANSWER_TIMEOUT_S)
        self._triton = triton.InferenceServerClient(address.authority, ssl=address.tls)

    def must_listen(self) -> None:
        """Raises ServeError where nobody listens."""
        try:
            self._client.models()
        except ConnectionFailed as error:
            raise ServeError(f"nobody listens at {self._url}: {error}", hint=_NOBODY) from error

    def live_versions(self, model: str) -> list[int]:
        """The versions of `model` that are loaded there; none where nobody listens, or the model is not served.

        Raises ServeError where the server knows no such model: its repository is another.
        """
        try:
            entries = [entry for entry in self._client.models() if entry.name == model]
        except ConnectionFailed:
            return []
        if not entries:
            raise ServeError(
                f"the server at {self._url} knows no model {model}: it serves another repository",
                hint="name the server with --url, or the repository with --repository",
            )
        return sorted(int(entry.version) for entry in entries if entry.state == "READY")

    def load(self, model: str, hopeless: Callable[[], str | None] = lambda: None) -> None:
        """Has the model be what its config.pbtxt says; returns when that is so.

        `hopeless` is asked several times a second why there is no use in waiting: Triton 2.51 never ends a load whose
        process has died. Raises LoadHopeless with that reason, ServeError for what Triton itself says.
        """
        self._wait_for(self._triton.load_model, model, hopeless)

    def unload(self, model: str, hopeless: Callable[[], str | None] = lambda: None) -> None:
        """Takes the model off the server; see `load`."""
        self._wait_for(self._triton.unload_model, model, hopeless)

    def ask(self, model: str, version: int) -> None:
        """One greedy token; a full queue is an answer too. Raises ClientError, with what the server said, for none."""
        with contextlib.suppress(Overloaded):
            self._client.generate(model, "Hello", version=version, max_tokens=1, temperature=0, probe=True)

    def loading(self) -> list[tuple[str, int]]:
        """The models and versions that are being loaded. Raises ClientError."""
        return [(entry.name, int(entry.version)) for entry in self._client.models() if entry.state == "LOADING"]

    def close(self) -> None:
        self._triton.close()
        self._client.close()

    def _wait_for(self, call: Callable[..., None], model: str, hopeless: Callable[[], str | None]) -> None:
        ended: Future[None] = Future()

        def run() -> None:
            try:
                call(model, client_timeout=_LOAD_TIMEOUT_S)
                ended.set_result(None)
            except Exception as error:  # the boundary of a thread: raised below
                ended.set_exception(error)

        # A thread of its own, which close() ends: the caller goes on hearing signals and `hopeless`.
        threading.Thread(target=run, name="stillhouse-load", daemon=True).start()
        while not wait([ended], _LOOK_S).done:
            if (reason := hopeless()) is not None:
                raise LoadHopeless(reason)
        try:
            ended.result()
        except InferenceServerException as error:
            raise ServeError(_one_line(error)) from error


def _one_line(error: InferenceServerException) -> str:
    """Without the place in Python's code, which Triton adds."""
    return " ".join((error.message() or str(error)).partition("\nAt:")[0].split())
