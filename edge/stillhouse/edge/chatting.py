"""`stillhouse edge chat`: a conversation in the terminal with a model that is loaded in this process."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator, Iterator
from typing import TextIO

from stillhouse.engine.errors import InvalidRequest
from stillhouse.engine.model import LanguageModel
from stillhouse.engine.sampling import SamplingParams
from stillhouse.engine.thinking import CLOSE, OPEN
from stillhouse.gateway.generator import describe
from stillhouse.gateway.thoughts import Splitter

_ENDS = ("/exit", "/quit")
_FORGETS = "/clear"


class Conversation:
    """The turns so far; thoughts are shown and then forgotten, as chat templates expect."""

    def __init__(self, model: LanguageModel, params: SamplingParams, system: str | None, out: TextIO) -> None:
        self._model = model
        self._params = params
        self._served = describe(model.version, model.tokenizer, model.engine.limits)
        self._system = [{"role": "system", "content": system}] if system is not None else []
        self.turns: list[dict[str, str]] = []
        self._out = out
        self._begin, self._end = ("\033[2m", "\033[0m") if _in_colour(out) else (OPEN, CLOSE)

    def clear(self) -> None:
        self.turns = []

    def ask(self, text: str) -> bool:
        """Streams the answer to `text`; False where Ctrl-C stopped it. What was said until then stays said.

        Raises StillhouseError; the turn is then as if it had not been.
        """
        before = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        content: list[str] = []
        try:
            with contextlib.closing(self._pieces()) as pieces:
                self._write(pieces, content)
        except KeyboardInterrupt:
            return False
        except BaseException:
            self.turns = before
            raise
        finally:
            if len(self.turns) % 2:
                self.turns.append({"role": "assistant", "content": "".join(content)})
        return True

    def _pieces(self) -> Generator[tuple[str, str], None, None]:
        """(thoughts, content) as they come."""
        prompt_ids = self._prompt_ids()
        splitter = Splitter(self._served, prompt_ids, self._params)
        with contextlib.closing(self._model.stream(prompt_ids, self._params)) as chunks:
            for chunk in chunks:
                yield splitter.push(chunk)

    def _prompt_ids(self) -> list[int]:
        """The conversation's tokens; its oldest turns are left out where it has become too long for the context."""
        length = self._model.max_model_len
        room = length - min(self._params.max_tokens, length // 2)
        while True:
            ids = self._model.prompt_ids(messages=[*self._system, *self.turns])
            # A lone question may take what there is; too long a one, the engine refuses.
            if len(ids) <= room or len(self.turns) == 1:
                return ids
            del self.turns[:2]
            print("(the oldest turn is forgotten: the context is full)", file=sys.stderr)

    def _write(self, pieces: Iterator[tuple[str, str]], content: list[str]) -> None:
        """Prints thoughts, dimmed or between tags, and content, which is also added to `content`."""
        inside = False
        try:
            for thoughts, said in pieces:
                if thoughts and not inside:
                    self._out.write(self._begin)
                    inside = True
                self._out.write(thoughts)
                if said and inside:
                    self._out.write(f"{self._end}\n\n")
                    inside = False
                self._out.write(said)
                self._out.flush()
                content.append(said)
        finally:
            self._out.write(f"{self._end}\n" if inside else "\n")
            self._out.flush()


def talk(model: LanguageModel, params: SamplingParams, system: str | None) -> None:
    """Reads lines and answers them until the input ends; Ctrl-C stops an answer, or forgets a half-written line."""
    conversation = Conversation(model, params, system, sys.stdout)
    if sys.stdin.isatty():
        _help_typing()
        print("Ctrl-C stops an answer, Ctrl-D or /exit ends, /clear begins anew", file=sys.stderr)
    while True:
        try:
            line = _read_line()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print(file=sys.stderr)
            continue
        if line is None or line in _ENDS:
            return
        if line == _FORGETS:
            conversation.clear()
        elif line:
            try:
                if not conversation.ask(line):
                    print("(stopped)", file=sys.stderr)
            except InvalidRequest as error:
                print(f"error: {error}", file=sys.stderr)


def _read_line() -> str | None:
    """The next line without its white space; None at the end of the input."""
    if not sys.stdin.isatty():
        # Whoever pipes questions in wants the answers alone on stdout.
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except EOFError:
        print(file=sys.stderr)
        return None


def _in_colour(out: TextIO) -> bool:
    return out.isatty() and not os.environ.get("NO_COLOR")


def _help_typing() -> None:
    """Arrow keys and a history for `input`, where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
