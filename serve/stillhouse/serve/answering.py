"""A request under way in a model's process, and the thread that sends its answers."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import triton_python_backend_utils as pb_utils

from stillhouse.engine.errors import DeadlineExceeded, EngineClosed, InvalidRequest, QueueFull, StillhouseError
from stillhouse.serve.answers import answer_tensors
from stillhouse.serve.errors import kind_and_line
from stillhouse.serve.metrics import SUCCESSES, Metrics

if TYPE_CHECKING:
    from stillhouse.engine.answer import Chunk
    from stillhouse.engine.model import LanguageModel, Submitted
    from stillhouse.serve.tensors import Question
    from stillhouse.serve.watch import Watcher

log = logging.getLogger(__name__)

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Outbox:
    """One thread that sends: a response costs a few hundred microseconds, in which the engine can compute."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Answering, Chunk] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="stillhouse-send", daemon=True)
        self._thread.start()

    def put(self, answering: Answering, chunk: Chunk) -> None:
        self._queue.put((answering, chunk))

    def close(self) -> None:
        """Sends what is there, then ends."""
        self._queue.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (item := self._queue.get()) is not None:
            answering, chunk = item
            try:
                answering.deliver(chunk)
            except Exception as error:  # the boundary: a response that cannot be sent must not stop the other requests
                log.exception("a response could not be sent")
                answering.fail(StillhouseError(f"the answer cannot be sent: {error!r}"))
            # Not kept until the next one comes: what an answering holds has to go before the model does.
            del answering, chunk, item


class Answering:
    """A request from its coming on: submits it, takes its chunks, and sends them one by one, or all at the end."""

    def __init__(
        self,
        question: Question,
        sender: Any,
        model: LanguageModel,
        outbox: Outbox,
        watcher: Watcher,
        metrics: Metrics,
    ) -> None:
        self._question = question
        self._sender: Any = sender  # None once the last response is sent
        self._model = model
        self._outbox = outbox
        self._watcher = watcher
        self._metrics = metrics
        self._running = self.num_answers
        # Of each answer: its chunks where it is not streamed, and the last that was sent.
        self._gathered: list[list[Chunk]] = [[] for _ in range(self.num_answers)]
        self._lasts: list[Chunk | None] = [None] * self.num_answers
        self._prompt = ""
        self._request: Submitted | None = None
        self._last_token_s: dict[int, float] = {}  # by answer
        self._came_s = time.perf_counter()
        self._cancelled = False
        self.asked = 0  # the watcher's
        self._cut = EngineClosed("the request was cancelled: the model is being unloaded")
        # Held from submit() until the request can be cancelled, while is_cancelled() is asked, and for the last
        # response: is_cancelled() of a request whose final flag has been sent kills the whole server.
        self._lock = threading.Lock()
        watcher.add(self)

    @property
    def num_answers(self) -> int:
        return self._question.params.n

    def begin(self) -> None:
        """Submits the question to the engine, unless nobody waits for it any more.

        Raises StillhouseError; nothing has been sent then, and `fail` is to be called.
        """
        if self._cancelled:
            with self._lock:
                self._end_cancelled()
                self._let_go()
            return
        question = self._question
        ids = self._model.prompt_ids(text=question.text, messages=question.messages, input_ids=question.input_ids)
        if question.repeats_prompt:
            self._prompt = question.text or self._model.tokenizer.decode(ids, skip_special_tokens=False)
        with self._lock:
            self._request = self._model.submit(
                ids, question.params, self._take, timeout_s=question.timeout_s, came_s=self._came_s
            )
        if self._cancelled:  # meanwhile
            self.cancel()

    @property
    def holds_slot(self) -> bool:
        request = self._request
        return request is not None and request.timing.scheduled_s is not None

    def is_abandoned(self) -> bool:
        """Whether the client has gone; false where it cannot be asked at once, as while a grammar is being compiled."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return self._sender is not None and bool(self._sender.is_cancelled())
        finally:
            self._lock.release()

    def cancel(self) -> None:
        self._cancelled = True
        request = self._request
        if request is not None:
            request.cancel()

    def cut(self, reason: EngineClosed) -> None:
        """As `cancel`, but whoever waits is told the reason."""
        self._cut = reason
        self.cancel()

    def deliver(self, chunk: Chunk) -> None:
        """Sends what `chunk` brings; called on the outbox's thread."""
        if self._sender is None:  # it has failed before
            return
        if chunk.finish_reason is None:
            self._send(chunk, final=False)
            return
        with self._lock:
            if self._deliver_end(chunk):
                self._let_go()

    def fail(self, error: StillhouseError) -> None:
        """Ends it with `error` in place of what could not be submitted or delivered."""
        self.cancel()
        with self._lock:
            sender = self._sender
            self._let_go()
        try:
            self._send_error(sender, error)
        except Exception:  # the boundary: nothing can be sent, and whoever waited has gone
            log.exception("nor could the error be sent")

    def _let_go(self) -> None:
        self._watcher.remove(self)
        # The engine's request leads back here. Uncut, the sender and its shared memory would wait for the garbage
        # collector, and one that is collected after the end of the model crashes.
        self._request = self._sender = None

    def _take(self, chunk: Chunk) -> None:
        """Called on the engine's thread with every chunk."""
        self._measure(chunk)
        if not self._question.stream:
            self._gathered[chunk.index].append(chunk)
        if self._question.stream or chunk.finish_reason is not None:
            self._outbox.put(self, chunk)

    def _deliver_end(self, chunk: Chunk) -> bool:
        """Sends the end of one answer; whether that is the end of the request."""
        if chunk.finish_reason == "error":
            self.cancel()  # the other answers
            self._send_error(self._sender, chunk.error or StillhouseError("the engine failed"))
            return True
        if chunk.finish_reason == "cancelled":
            self._end_cancelled()
            return True
        self._running -= 1
        if self._question.stream or not self._running:
            self._send(chunk, final=not self._running)
        return not self._running

    def _end_cancelled(self) -> None:
        """To a client that has gone, the final flag alone; to one that waits while the model ends, an error."""
        if self._sender.is_cancelled():
            self._sender.send(flags=FINAL)
        else:
            self._send_error(self._sender, self._cut)

    def _send_error(self, sender: Any, error: StillhouseError) -> None:
        if not self._question.probe:
            self._metrics.count_error(error)
        send_error(sender, error)

    def _send(self, chunk: Chunk, *, final: bool) -> None:
        parts: list[list[Chunk]] = self._gathered
        if self._question.stream:
            parts = [[chunk] if index == chunk.index else [] for index in range(self.num_answers)]
        self._lasts = [part[-1] if part else last for part, last in zip(parts, self._lasts, strict=True)]
        outputs = answer_tensors(self._question, parts, self._lasts, self._prompt, self._token_text)
        response = pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])
        self._sender.send(response, flags=FINAL if final else 0)

    def _token_text(self, token_id: int) -> str:
        return self._model.tokenizer.decode([token_id], skip_special_tokens=False)

    def _measure(self, chunk: Chunk) -> None:
        if self._question.probe:
            self._metrics.leave_out(chunk)
            return
        now_s, before_s = time.perf_counter(), self._last_token_s.get(chunk.index)
        if chunk.token_ids:
            if before_s is None:
                self._metrics.observe("time_to_first_token_seconds", now_s - self._came_s)
            else:
                self._metrics.observe("inter_token_latency_seconds", now_s - before_s)
            self._last_token_s[chunk.index] = now_s
        if chunk.finish_reason in SUCCESSES:
            self._metrics.observe("e2e_request_latency_seconds", now_s - self._came_s)
            timing = self._request.timing if self._request else None
            if timing and timing.scheduled_s is not None:
                self._metrics.observe("request_queue_time_seconds", timing.scheduled_s - timing.submitted_s)


def send_error(sender: Any, error: StillhouseError) -> None:
    """The error as the request's only or last response, with the gRPC code that fits."""
    code = pb_utils.TritonError.INTERNAL
    if isinstance(error, InvalidRequest):
        code = pb_utils.TritonError.INVALID_ARG
    elif isinstance(error, (QueueFull, EngineClosed, DeadlineExceeded)):  # as Triton says it of its own time-out
        code = pb_utils.TritonError.UNAVAILABLE
    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(kind_and_line(error), code))
    sender.send(response, flags=FINAL)
