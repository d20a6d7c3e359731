"""An error is one line that can be sent, whatever a request has put into it."""

from __future__ import annotations

import numpy as np
import pytest

from stillhouse.engine.errors import InvalidRequest
from stillhouse.serve.errors import kind_and_line, one_line
from stillhouse.serve.tensors import read_question


def test_the_hint_follows_in_brackets() -> None:
    assert one_line(InvalidRequest("it is wrong", hint="mend it")) == "it is wrong (mend it)"


def test_line_breaks_half_characters_and_length_do_no_harm() -> None:
    said = one_line(InvalidRequest("a\nb\r\n\ud800" + "x" * 10**6))
    assert said.startswith("a b \\ud800x")
    assert len(said) == 1000
    said.encode("utf-8")


def test_what_vllms_backend_refuses_too_is_told_in_its_words() -> None:
    tensors = {"text_input": np.array([b"Hi"], np.object_)}
    tensors |= {name: np.array([name == "stream"]) for name in ("stream", "exclude_input_in_output")}
    with pytest.raises(InvalidRequest) as refused:
        read_question(tensors.get, "{}")
    words = "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed."
    assert kind_and_line(refused.value) == words
