"""<think>…</think> is split off whatever the pieces, also where the prompt has opened the tag."""

from __future__ import annotations

import itertools
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import THINKERS, one_token_a_tag, written

from stillhouse.engine.answer import Chunk, TextSink
from stillhouse.engine.request import Token
from stillhouse.engine.sampling import SamplingParams
from stillhouse.engine.text import Tokenizer
from stillhouse.engine.thinking import CLOSE, Thinking, thinking_tags
from stillhouse.gateway.generator import ServedModel
from stillhouse.gateway.thoughts import Splitter, Thoughts

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
ASKED = {"model": "thinker-int4", "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
# What tags are made of, and what stands beside them.
LETTERS = st.sampled_from(
    ["<think>", "</think>", "<", "/", "think", ">", "<thi", "</", "\n", "\n\n", "a", " ", "é", "b\n"]
)
TEXTS = st.lists(LETTERS, max_size=30).map("".join)


def split(pieces: list[str], *, inside: bool) -> tuple[str, str]:
    thoughts = Thoughts(inside=inside)
    parts = [*map(thoughts.push, pieces), thoughts.flush()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(places)]


@given(TEXTS, st.lists(st.integers(0, 1000), max_size=12), st.booleans())
def test_any_cut_of_the_text_gives_the_same_split(text: str, cuts: list[int], inside: bool) -> None:
    whole = split([text], inside=inside)
    assert split(pieces_of(text, cuts), inside=inside) == whole
    assert split(list(text), inside=inside) == whole


@given(TEXTS, st.booleans())
def test_nothing_but_tags_and_line_breaks_is_lost(text: str, inside: bool) -> None:
    def essence(part: str) -> list[str]:
        return sorted(part.replace("<think>", "").replace("</think>", "").replace("\n", ""))

    thoughts, content = split([text], inside=inside)
    # A closing tag outside and an opening one inside are text like any other.
    assert essence(thoughts + content) == essence(text)


@pytest.fixture(scope="module", params=THINKERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("thinks")
    written(request.param(), directory)
    (directory / "chat_template.jinja").write_text("<think></think>", "utf-8")
    return Tokenizer(directory)


@given(text=TEXTS, inside=st.booleans())
def test_the_engine_follows_thoughts_by_the_same_rule(tokenizer: Tokenizer, text: str, inside: bool) -> None:
    tags, prompt = thinking_tags(tokenizer), tokenizer.encode("<think>\n" if inside else "hi", add_special_tokens=False)
    assert tags is not None
    follower, thoughts = Thinking(tags, prompt, None), Thoughts(inside=inside)
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        follower.push(token_id)
        thoughts.push(tokenizer.decode([token_id]))
        assert follower.inside == thoughts.awaits(CLOSE)


@pytest.mark.parametrize(
    ("text", "inside", "thoughts", "content"),
    [
        ("<think>\nwell\n</think>\n\nParis.", False, "well", "Paris."),
        ("well\nyes\n</think>\n\nParis.\n", True, "well\nyes", "Paris.\n"),
        ("\n<think>\nwell</think>Paris.", True, "well", "Paris."),
        ("still thinking", True, "still thinking", ""),
        ("</think>Paris.", True, "", "Paris."),
        ("Paris.", False, "", "Paris."),
        ("a <b> c", False, "", "a <b> c"),
        ("<think>one</think>\n<think>two</think>three", False, "onetwo", "three"),
        ("<think>one</think>two<think>three</think>", False, "one", "two<think>three</think>"),
        ("Between <think> and </think> a model thinks.", False, "", "Between <think> and </think> a model thinks."),
    ],
)
def test_the_split_is_what_one_expects(text: str, inside: bool, thoughts: str, content: str) -> None:
    assert split([text], inside=inside) == (thoughts, content)


def split_chunks(
    tmp_path: Path, answer: str, params: SamplingParams, *, prompt: str = "hi", special: bool = True
) -> tuple[str, str]:
    """What the gateway makes of a model's answer; the tags are tokens of their own, `special` ones or not."""
    tokenizer = written(one_token_a_tag(special=special), tmp_path)
    tags = thinking_tags(tokenizer)
    assert tags is not None
    prompt_ids, ids = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer))
    chunks: list[Chunk] = []
    sink = TextSink(tokenizer, params, len(prompt_ids), Thinking(tags, prompt_ids, None), 0, chunks.append)
    for at, token_id in enumerate(ids):
        sink(Token(token_id, finish_reason="length" if at == len(ids) - 1 else None))
    model = ServedModel("thinker", 1, 0, 256, 1, 256, 4096, 400, tokenizer, params, tags)
    splitter = Splitter(model, prompt_ids, params)
    parts = [splitter.push(chunk) for chunk in chunks]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_a_tag_is_in_neither_part_whether_its_token_is_special_and_is_skipped_or_not(
    tmp_path: Path, special: bool, skip: bool
) -> None:
    params = SamplingParams(skip_special_tokens=skip)
    parts = split_chunks(tmp_path, "<think>\nwell\n</think>\n\nParis", params, special=special)
    assert parts == ("well", "Paris")


@pytest.mark.parametrize("special", [True, False])
def test_what_a_stop_string_holds_back_stays_on_its_side_of_a_tag(tmp_path: Path, special: bool) -> None:
    params = SamplingParams(stop=("END",))
    parts = split_chunks(tmp_path, "<think>choose E</think>Paris", params, special=special)
    assert parts == ("choose E", "Paris")
    parts = split_chunks(tmp_path, "<think>choose E</think>ND", params, special=special)
    assert parts == ("choose E", "ND")


def test_a_special_tag_that_is_none_is_left_out_like_any_special_token(tmp_path: Path) -> None:
    parts = split_chunks(tmp_path, "<think>well<think></think>Paris</think> or <think>Rome", SamplingParams())
    assert parts == ("well", "Paris or Rome")


@pytest.mark.parametrize("special", [True, False])
def test_a_tag_in_the_question_makes_no_thoughts_of_the_answer(tmp_path: Path, special: bool) -> None:
    parts = split_chunks(
        tmp_path, "A tag.", SamplingParams(), prompt="<s>user: What is <think>?</s><s>assistant:", special=special
    )
    assert parts == ("", "A tag.")


def test_a_thinker_that_is_not_stopped_thinks_all_the_time(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=ASKED | {"max_tokens": 8, "ignore_eos": True}).json()
    message = answer["choices"][0]["message"]
    assert message["content"] is None
    assert message["reasoning_content"]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 8


def test_a_budget_ends_the_thoughts_and_both_are_counted_streamed_and_not(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    asked = ASKED | {"thinking_token_budget": 5, "ignore_eos": True, "max_tokens": 24}
    answer = http.post("/v1/chat/completions", json=asked).json()
    message, usage = answer["choices"][0]["message"], answer["usage"]
    assert message["reasoning_content"]
    assert message["content"]
    assert "think>" not in message["reasoning_content"] + message["content"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 5
    assert usage["completion_tokens"] == 24

    extra = {"thinking_token_budget": 5, "ignore_eos": True}
    stream = client.chat.completions.create(
        model="thinker-int4",
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message["reasoning_content"]
    assert "".join(delta.content or "" for delta in deltas) == message["content"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.model_dump(exclude_none=True) == usage


@pytest.mark.parametrize(("effort", "tokens"), [("none", 0), ("minimal", 20)])
def test_an_effort_is_a_budget(http: httpx.Client, effort: str, tokens: int) -> None:
    answer = http.post(
        "/v1/chat/completions", json=ASKED | {"reasoning_effort": effort, "max_tokens": 20, "ignore_eos": True}
    ).json()
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == tokens


def test_a_model_that_does_not_think_refuses_an_effort(http: httpx.Client) -> None:
    refused = http.post("/v1/chat/completions", json=ASKED | {"model": "support-int4", "reasoning_effort": "high"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "reasoning_effort"
