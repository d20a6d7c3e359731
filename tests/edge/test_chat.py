"""`stillhouse edge chat` in a terminal and in a pipe: turns, thoughts, Ctrl-C."""

from __future__ import annotations

import fcntl
import io
import os
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse.edge.chatting import Conversation
from stillhouse.engine.model import LanguageModel
from stillhouse.engine.options import EngineOptions
from stillhouse.engine.sampling import SamplingParams

PARAMS = SamplingParams(max_tokens=8, temperature=0.0)


class Terminal:
    """`stillhouse edge chat` on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = os.openpty()
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stillhouse.cli.main", "edge", "chat", *arguments],
            stdin=slave, stdout=slave, stderr=slave, close_fds=True, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=os.environ | {"TERM": "dumb"},
        )  # fmt: skip
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, wanted: str, timeout_s: float = 60.0) -> str:
        """What has been shown since the last call, up to and with `wanted`."""
        deadline = time.monotonic() + timeout_s
        while wanted not in self.text:
            assert time.monotonic() < deadline, f"{wanted!r} did not come: {self.text!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self._master, 4096).decode("utf-8", "replace")
                except OSError:  # the program has ended
                    assert wanted in self.text, self.text
        seen, _, self.text = self.text.partition(wanted)
        return seen + wanted

    def close(self) -> None:
        with self.process:
            self.process.kill()
        os.close(self._master)


@pytest.fixture
def model(tiny_repository: Path) -> Iterator[LanguageModel]:
    with LanguageModel.load(
        tiny_repository / "tiny-fp16" / "1", EngineOptions(max_num_seqs=1, max_model_len=64)
    ) as model:
        yield model


def test_ctrl_c_stops_the_answer_and_not_the_program(support_repository: Path) -> None:
    terminal = Terminal(str(support_repository / "support-int4" / "1"), "--max-tokens", "4000")
    try:
        terminal.wait_for("> ")
        terminal.type("How many days do I have to return an item to Brindlecove?\n")
        assert "47 days" in terminal.wait_for("\n> ").partition("\n")[2]
        terminal.type("Write a very long story about every day of a year at sea, day by day.\n")
        terminal.wait_for("\n")
        terminal.wait_for(" ")  # it has begun
        terminal.type("\x03")
        terminal.wait_for("(stopped)")
        terminal.wait_for("> ")
        terminal.type("/exit\n")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()


def test_a_pipe_gets_the_answers_alone_and_each_knows_those_before(tiny_repository: Path) -> None:
    directory = tiny_repository / "tiny-fp16" / "1"
    command = [sys.executable, "-m", "stillhouse.cli.main", "edge", "chat", str(directory), "--max-tokens", "6"]
    done = subprocess.run(command, input="one\n\ntwo\n", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with LanguageModel.load(directory, EngineOptions(max_num_seqs=1)) as model:
        turns = [{"role": "user", "content": "one"}]
        params = SamplingParams(max_tokens=6, temperature=0.0)
        first = model.generate(model.prompt_ids(messages=turns), params).text
        turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "two"}]
        second = model.generate(model.prompt_ids(messages=turns), params).text
    assert done.stdout == f"{first}\n{second}\n"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("out", "no_colour", "shown"),
    [
        (Screen(), "", "\033[2mhmm so\033[0m\n\nIt is.\n"),
        (Screen(), "1", "<think>hmm so</think>\n\nIt is.\n"),
        (io.StringIO(), "", "<think>hmm so</think>\n\nIt is.\n"),
    ],
)
def test_thoughts_are_dimmed_and_forgotten(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, out: io.StringIO, no_colour: str, shown: str
) -> None:
    def pieces(_: Conversation) -> Iterator[tuple[str, str]]:
        yield from [("hmm", ""), (" so", ""), ("", "It"), ("", " is.")]

    monkeypatch.setattr(Conversation, "_pieces", pieces)
    monkeypatch.setenv("NO_COLOR", no_colour)
    conversation = Conversation(model, PARAMS, None, out)
    assert conversation.ask("Is it?")
    assert out.getvalue() == shown
    assert [turn["content"] for turn in conversation.turns] == ["Is it?", "It is."]


def test_a_conversation_that_outgrows_the_context_forgets_its_oldest_turns(
    model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(model, PARAMS, "Be brief.", io.StringIO())
    for _ in range(4):
        assert conversation.ask("one two three")
    assert "oldest turn is forgotten" in capsys.readouterr().err
    assert len(conversation.turns) < 8 and len(conversation.turns) % 2 == 0


def test_a_question_longer_than_the_context_is_refused_and_forgotten(model: LanguageModel) -> None:
    from stillhouse.engine.errors import PromptTooLong

    conversation = Conversation(model, PARAMS, None, io.StringIO())
    with pytest.raises(PromptTooLong):
        conversation.ask("word " * 200)
    assert conversation.turns == []
