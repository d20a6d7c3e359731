"""The model as Triton's Python backend drives it: loaded, asked, ended, in the model's own process.

A request's way: execute() reads its tensors and hands it to a door thread (tokenizing), which submits it to the
engine; the engine's thread sends the answers. Nothing waits in between, so a model's requests run together.
"""

from __future__ import annotations

import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton_python_backend_utils as pb_utils

from stillhouse.engine.errors import EngineClosed, InvalidRequest, QueueFull, StillhouseError
from stillhouse.engine.model import Chunk, LanguageModel
from stillhouse.engine.options import read_options
from stillhouse.serve import tensors
from stillhouse.serve.answers import answer_tensors
from stillhouse.serve.metrics import SUCCESSES, Metrics
from stillhouse.serve.protocol import LOAD_ERROR_MARK, OPTIONS_VARIABLE
from stillhouse.serve.watch import Watcher

if TYPE_CHECKING:
    from stillhouse.engine.request import Request
    from stillhouse.serve.tensors import Question

log = logging.getLogger(__name__)

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_DOOR_THREADS = 2
_CLOSE_TIMEOUT_S = 5.0


class ServedVersion:
    """One version of a model, for the life of its process."""

    def __init__(self, args: dict[str, str]) -> None:
        """Opens the version: hashes its files, loads it, starts its engine. `args` are those of initialize().

        Raises TritonModelException, after a line in the log for the launcher.
        """
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        name, version = args["model_name"], args["model_version"]
        try:
            self._model = _load(Path(args["model_repository"]), version)
        except StillhouseError as error:
            _report_load_error(name, version, error)
            raise pb_utils.TritonModelException(_one_line(error)) from error
        self._door = ThreadPoolExecutor(_DOOR_THREADS, thread_name_prefix="stillhouse-door")
        self._watcher = Watcher(on_server_gone=_end_process)
        self._metrics = Metrics(pb_utils, name, version, self._model.stats)
        self._watcher.start()
        self._metrics.start()

    def execute(self, requests: list[Any]) -> None:
        """Takes the requests in and returns at once; every answer goes through its response sender."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                question = tensors.read_question(_reader(request), request.parameters())
            except StillhouseError as error:
                _send_error(sender, error)
            else:
                # Nothing keeps `request`: it is Triton's again when execute() returns.
                self._door.submit(self._begin, question, sender)

    def close(self) -> None:
        """Ends the engine; what still runs ends as cancelled."""
        self._door.shutdown()
        self._model.close(timeout_s=_CLOSE_TIMEOUT_S)
        self._watcher.close()
        self._metrics.close()

    def _begin(self, question: Question, sender: Any) -> None:
        """Runs on a door thread: text becomes tokens, tokens a request of the engine."""
        answering = Answering(question, sender, self._model, self._watcher, self._metrics)
        try:
            answering.begin()
        except StillhouseError as error:
            _send_error(sender, error)
        except Exception as error:  # the boundary: a client must never wait for an answer that cannot come
            log.exception("a request failed at the door")
            _send_error(sender, StillhouseError(f"internal error: {type(error).__name__}: {error}"))


class Answering:
    """A request under way: takes the engine's chunks, and sends them or gathers them."""

    def __init__(
        self, question: Question, sender: Any, model: LanguageModel, watcher: Watcher, metrics: Metrics
    ) -> None:
        self._question = question
        self._sender = sender
        self._model = model
        self._watcher = watcher
        self._metrics = metrics
        self._gathered: list[Chunk] = []
        self._prompt = ""
        self._request: Request | None = None
        self._last_token_s: float | None = None
        self._submitted_s = time.perf_counter()

    def begin(self) -> None:
        """Submits the question. Raises StillhouseError; nothing has been sent then."""
        question = self._question
        ids = self._model.prompt_ids(text=question.text, messages=question.messages, input_ids=question.input_ids)
        if question.repeats_prompt:
            self._prompt = question.text or self._model.tokenizer.decode(ids, skip_special_tokens=False)
        self._watcher.add(self)
        try:
            self._request = self._model.submit(ids, question.params, self._take)
        except StillhouseError:
            self._watcher.remove(self)
            raise

    def is_abandoned(self) -> bool:
        return bool(self._sender.is_cancelled())

    def cancel(self) -> None:
        if self._request is not None:
            self._request.cancel()

    def _take(self, chunk: Chunk) -> None:
        """Called on the engine's thread with every chunk; must not raise there."""
        try:
            self._measure(chunk)
            if chunk.finish_reason is not None:
                self._watcher.remove(self)
            self._answer(chunk)
        except Exception:  # the boundary: a response that cannot be sent must not stop the other requests
            log.exception("a response could not be sent")
            self.cancel()

    def _answer(self, chunk: Chunk) -> None:
        if chunk.finish_reason == "error":
            _send_error(self._sender, chunk.error or StillhouseError("the engine failed"))
        elif chunk.finish_reason == "cancelled":
            self._end_cancelled()
        elif self._question.stream:
            self._send([chunk], final=chunk.finish_reason is not None)
        else:
            self._gathered.append(chunk)
            if chunk.finish_reason is not None:
                self._send(self._gathered, final=True)

    def _end_cancelled(self) -> None:
        """To a client that has gone, the final flag alone; to one that waits while the server ends, an error."""
        if self._sender.is_cancelled():
            self._sender.send(flags=_FINAL)
        else:
            _send_error(self._sender, EngineClosed("the request was cancelled: the model is being unloaded"))

    def _send(self, chunks: list[Chunk], *, final: bool) -> None:
        outputs = answer_tensors(self._question, chunks, self._prompt, self._token_text)
        response = pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])
        self._sender.send(response, flags=_FINAL if final else 0)

    def _token_text(self, token_id: int) -> str:
        return self._model.tokenizer.decode([token_id], skip_special_tokens=False)

    def _measure(self, chunk: Chunk) -> None:
        now, before = time.perf_counter(), self._last_token_s
        if chunk.token_ids:
            if before is None:
                self._metrics.observe("time_to_first_token_seconds", now - self._submitted_s)
            else:
                self._metrics.observe("inter_token_latency_seconds", now - before)
            self._last_token_s = now
        if chunk.finish_reason in SUCCESSES:
            self._metrics.observe("e2e_request_latency_seconds", now - self._submitted_s)
            request = self._request
            if request is not None and request.timing.scheduled_s is not None:
                waited_s = request.timing.scheduled_s - request.timing.submitted_s
                self._metrics.observe("request_queue_time_seconds", waited_s)


def _load(model_directory: Path, version: str) -> LanguageModel:
    overrides = json.loads(os.environ.get(OPTIONS_VARIABLE) or "{}")
    options = read_options(model_directory, overrides)
    return LanguageModel.load(model_directory / version, options)


def _reader(request: Any) -> tensors.TensorReader:
    def read(name: str) -> Any:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()

    return read


def _send_error(sender: Any, error: StillhouseError) -> None:
    """The error as the request's only or last response, with the gRPC code that fits."""
    code = pb_utils.TritonError.INTERNAL
    if isinstance(error, InvalidRequest):
        code = pb_utils.TritonError.INVALID_ARG
    elif isinstance(error, (QueueFull, EngineClosed)):
        code = pb_utils.TritonError.UNAVAILABLE
    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(_one_line(error), code))
    sender.send(response, flags=_FINAL)


def _one_line(error: StillhouseError) -> str:
    return f"{error} ({error.hint})" if error.hint else str(error)


def _report_load_error(model: str, version: str, error: StillhouseError) -> None:
    report = {"model": model, "version": int(version), "message": str(error), "hint": error.hint}
    # One write, so that the line stays whole beside those of other processes.
    os.write(2, f"\n{LOAD_ERROR_MARK}{json.dumps(report)}\n".encode())


def _end_process() -> None:
    log.error("the Triton server has gone: this model's process ends")
    os._exit(1)
