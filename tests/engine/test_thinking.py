"""Where thoughts begin and end, whatever tokens the tags come in."""

from __future__ import annotations

from pathlib import Path

import pytest
from counting_engine import Collected, WantingRunner, run_until_idle
from small_tokenizers import THINKERS, byte_fallback, metaspace, one_token_a_tag, written
from tokenizers import Tokenizer as RustTokenizer

from stillhouse.engine.answer import Chunk, TextSink
from stillhouse.engine.core import Engine
from stillhouse.engine.request import Token
from stillhouse.engine.sampling import SamplingParams
from stillhouse.engine.scheduler import Limits
from stillhouse.engine.text import Tokenizer
from stillhouse.engine.thinking import Thinking, ThinkingTags, opens_thinking, thinking_tags


def thinker(rust: RustTokenizer, directory: Path) -> Tokenizer:
    written(rust, directory)
    (directory / "chat_template.jinja").write_text("<think></think>", "utf-8")
    return Tokenizer(directory)


@pytest.fixture(scope="module", params=[*THINKERS, byte_fallback])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return thinker(request.param(), tmp_path_factory.mktemp("thinks"))


@pytest.fixture(scope="module")
def tags(tokenizer: Tokenizer) -> ThinkingTags:
    found = thinking_tags(tokenizer)
    assert found is not None
    return found


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [
        ("hi<think>", True),
        ("hi<think>\n", True),
        ("hi<think>\n\n", True),
        ("<think></think><think>\n", True),
        ("hi", False),
        ("", False),
        ("hi<think>\n\n</think>\n\n", False),
        ("what is <think>?", False),
        ("<think>well, let me see. A raw prompt that stops amid a thought", False),
    ],
)
def test_the_end_of_a_prompt_says_whether_the_answer_begins_with_thoughts(
    tokenizer: Tokenizer, tags: ThinkingTags, prompt: str, opens: bool
) -> None:
    assert opens_thinking(ids_of(tokenizer, prompt), tags) == opens


@pytest.mark.parametrize(
    ("opened", "answer", "thoughts"),
    [
        (True, "let me see\n</think>\n\nParis", ["let me see\n"]),
        (True, "let me see.</think>{", ["let me see."]),
        (False, "<think>let me see\n</think>\n\nParis", ["let me see\n"]),
        (False, "\n<think>let</think>Paris", ["let"]),
        (False, "<think></think>Paris", []),
        (False, "<think>one</think>\n<think>two</think>three", ["one", "two"]),
        (True, "a < b </th think> </b></think>", ["a < b </th think> </b>"]),
        (False, "Between <think> and </think> a model thinks", []),
        (False, "<think>one</think>two<think>three", ["one"]),
    ],
)
def test_thoughts_are_counted_and_tags_and_content_are_not(
    tokenizer: Tokenizer, tags: ThinkingTags, opened: bool, answer: str, thoughts: list[str]
) -> None:
    prompt = ids_of(tokenizer, "hi<think>\n" if opened else "hi")
    thinking = Thinking(tags, prompt, None)
    for token_id in ids_of(tokenizer, answer):
        thinking.push(token_id)
    assert not thinking.inside
    assert thinking.tokens == sum(len(ids_of(tokenizer, thought)) for thought in thoughts)


@pytest.mark.parametrize("opened", [True, False])
def test_a_budget_ends_thoughts_that_would_go_on(tokenizer: Tokenizer, tags: ThinkingTags, opened: bool) -> None:
    prompt = ids_of(tokenizer, "hi<think>\n" if opened else "hi")
    opening = [] if opened else ids_of(tokenizer, "<think>")
    wanted = [*opening, *ids_of(tokenizer, "a") * 20]
    runner = WantingRunner(len(prompt), wanted, wanted, tokenizer._rust.get_vocab_size())
    engine, sink, thinking = Engine(runner, Limits(1, 64, 64), []), Collected(), Thinking(tags, prompt, 4)
    engine.submit(prompt, SamplingParams(max_tokens=20, temperature=0.0), sink, thinking=thinking)
    run_until_idle(engine)
    assert tuple(sink.ids[: len(opening) + 4 + len(tags.end)]) == (*wanted[: len(opening) + 4], *tags.end)
    assert len(sink.ids) == 20
    assert thinking.tokens == 4


def test_who_cannot_spell_the_tags_does_not_think(tmp_path: Path) -> None:
    assert thinking_tags(thinker(metaspace(), tmp_path)) is None


@pytest.mark.parametrize("stop", ["END", "\n\n"])
def test_what_is_held_back_before_a_tag_that_has_no_text_comes_out_before_it(tmp_path: Path, stop: str) -> None:
    tokenizer = thinker(one_token_a_tag(special=True), tmp_path)
    tags = thinking_tags(tokenizer)
    assert tags is not None
    params = SamplingParams(stop=(stop,))
    chunks: list[Chunk] = []
    sink = TextSink(tokenizer, params, 1, Thinking(tags, [5], None), 0, chunks.append)
    ids = ids_of(tokenizer, "<think>choose E\n</think>ND, \nParis")
    for at, token_id in enumerate(ids):
        sink(Token(token_id, finish_reason="length" if at == len(ids) - 1 else None))
    closed = ids.index(tags.end[0])
    assert "".join(chunk.text for chunk in chunks[: closed + 1]) == "choose E\n"
    assert "".join(chunk.text for chunk in chunks[closed + 1 :]) == "ND, \nParis"
    assert chunks[-1].finish_reason == "length"
