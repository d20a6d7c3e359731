"""What a user sees of an answer while it comes, whichever protocol brings it; and where in it the thoughts end."""

from __future__ import annotations

from dataclasses import dataclass

THOUGHTS_BEGIN, THOUGHTS_END = "<think>", "</think>"


@dataclass(frozen=True)
class Piece:
    """One response of a stream. `num_output_tokens` is the server's count so far; None where there is none (yet)."""

    text: str
    time_s: float  # since the request was sent
    thought: bool = False  # the server itself says that this is reasoning, not answer
    carries_token: bool = True  # False: only counts or an end
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None


class Answer:
    """What has come of an answer so far."""

    def __init__(self) -> None:
        self.first_s: float | None = None  # to the first token, since the request was sent
        self.last_s: float | None = None
        self.responses = 0  # that carried tokens
        self.prompt_tokens: int | None = None  # as the server counted them
        self.counted: int | None = None  # its tokens, likewise
        self.clock = AnswerClock()
        self._texts: list[str] = []

    def add(self, piece: Piece) -> None:
        if piece.carries_token:
            self.last_s = piece.time_s
            if self.first_s is None:
                self.first_s = piece.time_s
            self.responses += 1
            self.clock.add(piece)
            self._texts.append(piece.text)
        if piece.num_output_tokens is not None:
            self.counted = piece.num_output_tokens
        if piece.num_input_tokens is not None:
            self.prompt_tokens = piece.num_input_tokens

    @property
    def text(self) -> str:
        """Thoughts included."""
        return "".join(self._texts)


class AnswerClock:
    """When the first token after the thoughts came.

    A reasoning model's template may open the thoughts in the prompt already, so a first token is only known to be
    answer when the whole text is: then, without thoughts, it is the first token of all.
    """

    def __init__(self) -> None:
        self._beginning = ""
        self._tail = ""
        self._thought = False
        self._first_s: float | None = None  # of what no server called a thought
        self._after_s: float | None = None  # of what followed </think>
        self._ended = False

    def add(self, piece: Piece) -> None:
        """`piece` carries a token."""
        if piece.thought:
            self._thought = True
            return
        text = piece.text
        if self._first_s is None and (text.strip() or not self._thought):
            self._first_s = piece.time_s
        if self._ended:
            self._note(text, piece.time_s)
            return
        if len(self._beginning) < len(THOUGHTS_BEGIN) + 8:
            self._beginning += text
        _, end, rest = (self._tail + text).partition(THOUGHTS_END)
        self._tail = (self._tail + text)[-len(THOUGHTS_END) :]
        if end:
            self._ended = True
            self._note(rest, piece.time_s)

    def _note(self, text: str, time_s: float) -> None:
        if self._after_s is None and text.strip():
            self._after_s = time_s

    def first_answer_s(self, *, whole: bool) -> float | None:
        """None where none came, or (not `whole`) where nobody can know yet."""
        if self._ended:
            return self._after_s
        if self._beginning.lstrip().startswith(THOUGHTS_BEGIN):
            return None
        return self._first_s if whole or self._thought else None
