"""How an answer goes out, with what Triton gives to its Python models made up."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stillhouse.engine.answer import Chunk
from stillhouse.engine.errors import DeadlineExceeded, EngineClosed, InvalidRequest, QueueFull, StillhouseError
from stillhouse.serve.errors import metric_kind
from stillhouse.serve.tensors import read_question

FINAL = 1


@dataclass
class Sender:
    """Triton's side of a request: what was sent, as texts and errors, and whether the last was final."""

    sent: list[tuple[Any, int]] = field(default_factory=list)
    gone: bool = False

    def send(self, response: Any = None, flags: int = 0) -> None:
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        return self.gone


class Model:
    """Takes one request, and gives its chunks when told to."""

    def __init__(self) -> None:
        self.sink: Callable[[Chunk], None] = lambda _: None
        self.cancelled = False
        self.times_s: dict[str, float | None] = {}

    def prompt_ids(self, **_: Any) -> list[int]:
        return [1, 2]

    def submit(self, ids: list[int], params: Any, sink: Callable[[Chunk], None], **times_s: float | None) -> Any:
        assert (ids, params.max_tokens) == ([1, 2], 16)
        self.times_s = times_s
        self.sink = sink
        return SimpleNamespace(cancel=self.cancel, timing=None)

    def cancel(self) -> None:
        self.cancelled = True


def texts_of(output: Any) -> str | list[str]:
    """The text of an answer, or those of several."""
    texts = [text.decode() for text in output]
    return texts if len(texts) > 1 else texts[0]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """stillhouse.serve.answering over a made-up triton_python_backend_utils."""
    triton: Any = ModuleType("triton_python_backend_utils")
    triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    triton.Tensor = lambda name, array: (name, array)
    triton.InferenceResponse = lambda tensors=None, error=None: error or texts_of(dict(tensors)["text_output"])
    triton.TritonError = lambda message, code: f"{code}: {message}"
    for code in ("INTERNAL", "INVALID_ARG", "UNAVAILABLE"):
        setattr(triton.TritonError, code, code)
    monkeypatch.setitem(sys.modules, triton.__name__, triton)
    yield importlib.import_module("stillhouse.serve.answering")
    del sys.modules["stillhouse.serve.answering"]


@dataclass
class Watcher:
    """Who is being watched."""

    watched: list[Any] = field(default_factory=list)

    def add(self, made: Any) -> None:
        self.watched.append(made)

    def remove(self, made: Any) -> None:
        self.watched.remove(made)


@dataclass
class Figures:
    """What the metrics are told."""

    observed: list[str] = field(default_factory=list)
    left_out: list[Chunk] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def count_error(self, error: StillhouseError) -> None:
        self.errors.append(metric_kind(error))

    def observe(self, name: str, _: float) -> None:
        self.observed.append(name)

    def leave_out(self, chunk: Chunk) -> None:
        self.left_out.append(chunk)


def come(
    answering: ModuleType, outbox: Any, parameters: str = "{}", *, stream: bool, figures: Any = None
) -> tuple[Any, Model, Sender, Watcher]:
    tensors = {"text_input": np.array([b"Hi"], np.object_), "stream": np.array([stream])}
    model, sender, watcher = Model(), Sender(), Watcher()
    question = read_question(tensors.get, parameters)
    made = answering.Answering(question, sender, model, outbox, watcher, figures or Figures())
    return made, model, sender, watcher


def begun(answering: ModuleType, outbox: Any, *, stream: bool) -> tuple[Any, Model, Sender]:
    made, model, sender, _ = come(answering, outbox, stream=stream)
    made.begin()
    return made, model, sender


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_cannot_be_sent_ends_with_an_error_by_name_and_harms_nobody_else(
    answering: ModuleType, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    real = answering.answer_tensors

    def broken(question: Any, parts: list[list[Chunk]], *rest: Any) -> Any:
        if parts[0][0].text == "broken":
            raise ValueError("no such shape")
        return real(question, parts, *rest)

    monkeypatch.setattr(answering, "answer_tensors", broken)
    outbox = answering.Outbox()
    _, model, sender = begun(answering, outbox, stream=stream)
    _, other_model, other = begun(answering, outbox, stream=True)
    model.sink(Chunk("broken", (5,), 2, 1, None if stream else "stop"))
    model.sink(Chunk("", (), 2, 1, "cancelled"))
    other_model.sink(Chunk("fine", (5,), 2, 1, "stop"))
    outbox.close()
    assert sender.sent == [("INTERNAL: internal error: the answer cannot be sent: ValueError('no such shape')", FINAL)]
    assert model.cancelled
    assert other.sent == [("fine", FINAL)]


def test_who_is_cut_is_told_why(answering: ModuleType) -> None:
    outbox = answering.Outbox()
    made, model, sender = begun(answering, outbox, stream=True)
    model.sink(Chunk("one", (5,), 2, 1))
    made.cut(EngineClosed("the grace time is over"))
    assert model.cancelled
    model.sink(Chunk("", (), 2, 1, "cancelled"))
    outbox.close()
    assert sender.sent == [("one", 0), ("UNAVAILABLE: shut down: the grace time is over", FINAL)]


def test_several_answers_are_streamed_side_by_side_and_sent_whole_together(answering: ModuleType) -> None:
    chunks = [Chunk("a", (5,), 2, 1), Chunk("x", (6,), 2, 1, "stop", index=1), Chunk("b", (7,), 2, 2, "length")]
    sent = {True: [(["a", ""], 0), (["", "x"], 0), (["b", ""], FINAL)], False: [(["ab", "x"], FINAL)]}
    for stream, expected in sent.items():
        outbox = answering.Outbox()
        made, model, sender, watcher = come(
            answering, outbox, '{"n": 2, "exclude_input_in_output": true}', stream=stream
        )
        made.begin()
        for chunk in chunks:
            model.sink(chunk)
        outbox.close()
        assert [(texts if isinstance(texts, list) else [texts], flags) for texts, flags in sender.sent] == expected
        assert watcher.watched == []


def test_of_several_answers_one_that_fails_ends_all_with_its_error_once(answering: ModuleType) -> None:
    outbox = answering.Outbox()
    made, model, sender, _ = come(answering, outbox, '{"n": 2}', stream=True)
    made.begin()
    model.sink(Chunk("", (), 2, 0, "error", InvalidRequest("nothing fits"), index=1))
    model.sink(Chunk("", (), 2, 0, "cancelled"))
    outbox.close()
    assert model.cancelled
    assert sender.sent == [("INVALID_ARG: invalid request: nothing fits", FINAL)]


def test_its_time_runs_and_its_client_is_watched_before_it_reaches_the_engine(answering: ModuleType) -> None:
    outbox, before_s = answering.Outbox(), time.perf_counter()
    made, model, _, watcher = come(answering, outbox, '{"timeout_s": 3}', stream=True)
    assert watcher.watched == [made]
    after_s = time.perf_counter()
    made.begin()
    assert model.times_s["timeout_s"] == 3
    assert before_s <= (model.times_s["came_s"] or 0.0) <= after_s
    outbox.close()


def test_whoever_asks_for_the_client_does_not_wait_for_a_request_that_is_being_submitted(
    answering: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = answering.Outbox()
    made, model, sender, _ = come(answering, outbox, stream=True)
    sender.gone = True
    seen = list[bool]()
    monkeypatch.setattr(model, "submit", lambda *_, **__: seen.append(made.is_abandoned()))
    assert made.is_abandoned()
    made.begin()
    assert seen == [False]
    assert made.is_abandoned()
    outbox.close()


@pytest.mark.parametrize("gone", [True, False])
def test_what_is_cancelled_before_it_reaches_the_engine_is_not_submitted(answering: ModuleType, gone: bool) -> None:
    outbox = answering.Outbox()
    made, model, sender, watcher = come(answering, outbox, stream=True)
    sender.gone = gone
    made.cut(EngineClosed("the grace time is over"))
    made.begin()
    assert model.times_s == {}
    assert watcher.watched == []
    assert sender.sent == [(None if gone else "UNAVAILABLE: shut down: the grace time is over", FINAL)]
    assert not made.is_abandoned()
    outbox.close()


def test_no_metric_counts_a_probe(answering: ModuleType) -> None:
    for parameters, observed in (("{}", 3), ('{"probe": true}', 0)):
        outbox, figures = answering.Outbox(), Figures()
        made, model, _, _ = come(answering, outbox, parameters, stream=True, figures=figures)
        made.begin()
        chunks = [Chunk("one", (5,), 2, 1), Chunk("two", (6,), 2, 2, "stop")]
        for chunk in chunks:
            model.sink(chunk)
        outbox.close()
        assert len(figures.observed) == observed
        assert figures.left_out == ([] if observed else chunks)


@pytest.mark.parametrize("probe", [False, True])
def test_every_error_that_is_sent_is_counted_once_by_its_kind_but_those_of_a_probe(
    answering: ModuleType, probe: bool
) -> None:
    outbox, figures = answering.Outbox(), Figures()
    parameters = '{"probe": true}' if probe else "{}"

    def come_and_begin() -> tuple[Any, Model]:
        made, model, _, _ = come(answering, outbox, parameters, stream=True, figures=figures)
        made.begin()
        return made, model

    refused, _ = come_and_begin()
    refused.fail(QueueFull("the queue holds 4"))
    _, failing = come_and_begin()
    failing.sink(Chunk("", (), 2, 0, "error", DeadlineExceeded("no answer within 3 s")))
    cut, cutting = come_and_begin()
    cut.cut(EngineClosed("the grace time is over"))
    cutting.sink(Chunk("", (), 2, 0, "cancelled"))
    outbox.close()
    assert figures.errors == ([] if probe else ["queue_full", "timeout", "shut_down"])
