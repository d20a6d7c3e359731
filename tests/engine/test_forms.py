"""The form of an answer binds behind what a model thinks before it, whoever opens the thoughts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counting_engine import Collected, CountingRunner, WantingRunner, answer_alone, run_until_idle
from numpy.typing import NDArray
from small_tokenizers import THINKERS, written

from stillhouse.engine.core import Engine
from stillhouse.engine.errors import EngineError, InvalidRequest
from stillhouse.engine.grammar import GrammarCompiler
from stillhouse.engine.request import Constraint
from stillhouse.engine.sampling import SamplingParams, StructuredOutputs
from stillhouse.engine.scheduler import Limits
from stillhouse.engine.text import Message, Tokenizer
from stillhouse.engine.thinking import Thinking, thinking_tags

TEMPLATE = (
    "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<assistant>"
    "{% if thinking == 'opened' %}<think>\n{% elif thinking == 'off' %}<think>\n\n</think>\n\n{% endif %}"
)
QUESTION = [{"role": "user", "content": "how many?"}]
THREE_DIGITS = StructuredOutputs("regex", "[0-9]{3}")


@pytest.fixture(scope="module", params=THINKERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("thinks")
    written(request.param(), directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return Tokenizer(directory)


@pytest.fixture
def compiler(tokenizer: Tokenizer, tmp_path: Path) -> GrammarCompiler:
    tokenizer._rust.save(str(tmp_path / "tokenizer.json"))
    return GrammarCompiler.load(tmp_path, tokenizer._rust.get_vocab_size(), [1])


def answer(
    tokenizer: Tokenizer,
    compiler: GrammarCompiler,
    *,
    template: str,
    wants: str,
    budget_tokens: int | None = None,
    form: StructuredOutputs = THREE_DIGITS,
    messages: Sequence[Message] = QUESTION,
) -> tuple[str, Thinking]:
    """What a model that wants to say `wants` says behind a template that opens thoughts, shuts them, or neither."""
    rendered = tokenizer.render_chat(messages, variables={"thinking": template})
    prompt = tokenizer.encode(rendered, add_special_tokens=False)
    tags = thinking_tags(tokenizer)
    assert tags is not None
    thinking = Thinking(tags, prompt, budget_tokens)
    wanted = tokenizer.encode(wants, add_special_tokens=False)
    letters = [tokenizer.encode(tokenizer.decode([token])[:1], add_special_tokens=False)[0] for token in wanted]
    runner = WantingRunner(len(prompt), wanted, letters, tokenizer._rust.get_vocab_size())
    engine = Engine(runner, Limits(1, 256, 256), [1])
    sink = Collected()
    params = SamplingParams(max_tokens=60, temperature=0.0)
    engine.submit(prompt, params, sink, thinking=thinking, constraint=compiler.compile(form))
    run_until_idle(engine)
    assert sink.reason == "stop", sink.tokens[-1].error
    return tokenizer.decode(sink.ids), thinking


def test_a_form_begins_behind_thoughts_that_the_model_opens(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    text, thinking = answer(tokenizer, compiler, template="", wants="<think>let me see</think>well, 1")
    assert re.fullmatch("<think>let me see</think>[0-9]{3}", text)
    assert thinking.tokens == len(tokenizer.encode("let me see", add_special_tokens=False))


def test_a_form_begins_behind_thoughts_that_the_prompt_opened(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    text, _ = answer(tokenizer, compiler, template="opened", wants="let me see</think>well, 1")
    assert re.fullmatch("let me see</think>[0-9]{3}", text)


@pytest.mark.parametrize(
    "before",
    [
        [],
        [*QUESTION, {"role": "assistant", "content": "<think>well, let me"}],
        [*QUESTION, {"role": "assistant", "content": "<think>well</think>One."}],
    ],
)
@pytest.mark.parametrize("said", ["What does <think> mean, and how many?", "</think> or <think>\n?", "</think>"])
def test_a_tag_in_the_conversation_frees_no_answer_of_its_form(
    tokenizer: Tokenizer, compiler: GrammarCompiler, before: list[Message], said: str
) -> None:
    messages = [*before, {"role": "user", "content": said}]
    text, thinking = answer(tokenizer, compiler, template="", wants="I do not know, sorry", messages=messages)
    assert re.fullmatch("[0-9]{3}", text)
    assert thinking.tokens == 0
    # Nor does it keep the model from its thoughts.
    text, _ = answer(tokenizer, compiler, template="opened", wants="well</think>1", messages=messages)
    assert re.fullmatch("well</think>[0-9]{3}", text)


def test_a_form_sees_the_answer_from_its_first_letter(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    """Also where the tag's end and the answer's beginning could be one token."""
    form = StructuredOutputs("regex", r'\{"a": [0-9]\}')
    text, _ = answer(tokenizer, compiler, template="opened", wants='let me see.</think>{"a": 1}', form=form)
    assert re.fullmatch(r'let me see\.</think>\{"a": [0-9]\}', text)


@pytest.mark.parametrize("template", ["", "opened"])
def test_a_form_begins_behind_the_line_breaks_after_the_thoughts(
    tokenizer: Tokenizer, compiler: GrammarCompiler, template: str
) -> None:
    opening = "" if template else "<think>"
    wants = f"{opening}let me see\n</think>\n\nwell, 1"
    text, thinking = answer(tokenizer, compiler, template=template, wants=wants)
    assert re.fullmatch(f"{opening}let me see\n</think>\n*[0-9]{{3}}", text)
    assert thinking.tokens == len(tokenizer.encode("let me see\n", add_special_tokens=False))


def test_who_does_not_think_is_bound_from_the_first_token(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    text, thinking = answer(tokenizer, compiler, template="", wants="456<think>")
    assert text == "456"
    assert thinking.tokens == 0


def test_thoughts_that_the_prompt_shut_stay_shut(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    text, _ = answer(tokenizer, compiler, template="off", wants="<think>let me see</think>1")
    assert re.fullmatch("[0-9]{3}", text)


def test_a_budget_ends_the_thoughts_and_the_form_follows(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    text, thinking = answer(tokenizer, compiler, template="", wants="<think>let me see, I wonder", budget_tokens=3)
    assert re.fullmatch("<think>.*</think>[0-9]{3}", text)
    assert thinking.tokens == 3


def test_a_tag_within_the_form_is_text(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    """It neither frees what follows nor is it counted or cut by the budget."""
    form = StructuredOutputs("regex", "a<th[a-z]nk>[0-9]{12}")
    text, thinking = answer(tokenizer, compiler, template="", wants="a<think>xxxx", budget_tokens=2, form=form)
    assert re.fullmatch("a<th[a-z]nk>[0-9]{12}", text)
    assert thinking.tokens == 0


@pytest.mark.parametrize("where", ["allowed", "push"])
def test_a_form_that_fails_ends_its_own_answer_alone(where: str) -> None:
    class Broken(Constraint):
        finished = False

        def allowed(self) -> NDArray[np.bool_]:
            if where == "allowed":
                raise ValueError("the parser has lost its way")
            return np.ones(64, np.bool_)

        def push(self, token_id: int) -> None:  # noqa: ARG002  (what the protocol calls it)
            raise ValueError("the parser has lost its way")

    engine = Engine(CountingRunner(2), Limits(2, 64, 128), [0])
    broken, other = Collected(), Collected()
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    engine.submit([1, 2, 3], params, broken, constraint=Broken())
    engine.submit([4, 5, 6], params, other)
    run_until_idle(engine)
    assert broken.reason == "error"
    assert isinstance(broken.tokens[-1].error, EngineError)
    assert "lost its way" in str(broken.tokens[-1].error)
    assert other.ids == answer_alone([4, 5, 6], params)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("regex", "(", 'at 1(8): invalid regex "(" (in regex): regex parse error: ( error: unclosed group'),
        ("json", {"type": "string", "pattern": "("}, "regex parse error: ( error: unclosed group"),
        ("json", {"type": "nope"}, "Invalid type: nope"),
        ("grammar", "start: x", 'at 1(8): unknown name: "x"'),
    ],
)
def test_what_is_wrong_with_a_form_is_said_whole_in_one_line(
    compiler: GrammarCompiler, kind: str, value: Any, said: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        compiler.compile(StructuredOutputs(kind, value))
    assert str(refused.value) == f"structured_outputs.{kind} is not valid: {said}"


def test_of_a_long_regex_the_reason_is_said_all_the_same(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequest, match=r"is not valid: .* … .*error: unclosed group$") as refused:
        compiler.compile(StructuredOutputs("regex", "a" * 2000 + "("))
    assert len(str(refused.value)) < 400
