"""An error is one line that can be sent, whatever a request has put into it."""

from __future__ import annotations

from stillhouse.engine.errors import InvalidRequest
from stillhouse.serve.errors import one_line


def test_the_hint_follows_in_brackets() -> None:
    assert one_line(InvalidRequest("it is wrong", hint="mend it")) == "it is wrong (mend it)"


def test_line_breaks_half_characters_and_length_do_no_harm() -> None:
    said = one_line(InvalidRequest("a\nb\r\n\ud800" + "x" * 10**6))
    assert said.startswith("a b \\ud800x")
    assert len(said) == 1000
    said.encode("utf-8")
