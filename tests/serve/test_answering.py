"""How an answer goes out, with what Triton gives to its Python models made up."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stillhouse.engine.answer import Chunk
from stillhouse.engine.errors import EngineClosed
from stillhouse.serve.tensors import read_question

FINAL = 1


@dataclass
class Sender:
    """Triton's side of a request: what was sent, as texts and errors, and whether the last was final."""

    sent: list[tuple[Any, int]] = field(default_factory=list)

    def send(self, response: Any = None, flags: int = 0) -> None:
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        return False


class Model:
    """Takes one request, and gives its chunks when told to."""

    def __init__(self) -> None:
        self.sink: Callable[[Chunk], None] = lambda _: None
        self.cancelled = False

    def prompt_ids(self, **_: Any) -> list[int]:
        return [1, 2]

    def submit(self, ids: list[int], params: Any, sink: Callable[[Chunk], None], *, timeout_s: float | None) -> Any:
        assert (ids, params.max_tokens, timeout_s) == ([1, 2], 16, None)
        self.sink = sink
        return SimpleNamespace(cancel=self.cancel, timing=None)

    def cancel(self) -> None:
        self.cancelled = True


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """stillhouse.serve.answering over a made-up triton_python_backend_utils."""
    triton: Any = ModuleType("triton_python_backend_utils")
    triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    triton.Tensor = lambda name, array: (name, array)
    triton.InferenceResponse = lambda tensors=None, error=None: error or dict(tensors)["text_output"][0].decode()
    triton.TritonError = lambda message, code: f"{code}: {message}"
    for code in ("INTERNAL", "INVALID_ARG", "UNAVAILABLE"):
        setattr(triton.TritonError, code, code)
    monkeypatch.setitem(sys.modules, triton.__name__, triton)
    yield importlib.import_module("stillhouse.serve.answering")
    del sys.modules["stillhouse.serve.answering"]


def begun(answering: ModuleType, outbox: Any, *, stream: bool) -> tuple[Any, Model, Sender]:
    tensors = {"text_input": np.array([b"Hi"], np.object_), "stream": np.array([stream])}
    model, sender = Model(), Sender()
    nobody = SimpleNamespace(add=lambda _: None, remove=lambda _: None, observe=lambda *_: None)
    made = answering.Answering(read_question(tensors.get, "{}"), sender, model, outbox, nobody, nobody)
    made.begin()
    return made, model, sender


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_cannot_be_sent_ends_with_an_error_by_name_and_harms_nobody_else(
    answering: ModuleType, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    real = answering.answer_tensors

    def broken(question: Any, chunks: list[Chunk], *rest: Any) -> Any:
        if chunks[0].text == "broken":
            raise ValueError("no such shape")
        return real(question, chunks, *rest)

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
