"""Text in pieces equals text at once, for any tokenizer of the two kinds in use."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import as_stored, byte_fallback, byte_level, metaspace, odd_tokens, written
from tokenizers import AddedToken

from stillhouse.engine.answer import Chunk, TextSink
from stillhouse.engine.errors import InvalidRequest
from stillhouse.engine.request import Token
from stillhouse.engine.sampling import SamplingParams
from stillhouse.engine.text import Detokenizer, StopMatcher, Tokenizer


@pytest.fixture(scope="module", params=[byte_level, byte_fallback, metaspace, odd_tokens])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return written(request.param(), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return written(byte_level(), tmp_path_factory.mktemp("chat"))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_detokenising_in_pieces_equals_at_once(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """For any token ids at all: whole characters, halves of them, bytes that are none, special tokens."""
    size = tokenizer._rust.get_vocab_size()
    some = data.draw(st.lists(st.integers(0, size), min_size=1, max_size=6))
    ids = data.draw(st.lists(st.sampled_from(some) | st.integers(0, size), max_size=60))
    skip = data.draw(st.booleans())
    stream = Detokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [*(stream.push(token) for token in ids), stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("half", ["E4", "BD", "F0", "9F 98 80 F0", "A9 E4", "C3"])
def test_a_stream_without_a_whole_character_is_sent_and_forgotten_as_it_comes(tmp_path: Path, half: str) -> None:
    """Whatever comes for how long: a few tokens are kept, and one character held back."""
    rust = byte_level()
    token = as_stored(half)
    rust.add_tokens([AddedToken(token, normalized=False)])
    tokenizer = written(rust, tmp_path)
    token_id = rust.token_to_id(token)
    stream, sent = Detokenizer(tokenizer), ""
    for count in range(1, 200):
        sent += stream.push(token_id)
        assert len(stream._tail) <= 16
        assert len(sent) >= len(tokenizer.decode([token_id] * count)) - 1
    assert sent + stream.flush() == tokenizer.decode([token_id] * 199)


@given(st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=3), st.text("ab", max_size=60))
def test_no_more_is_held_back_than_a_stop_string_is_long(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    for letter in text:
        matcher.push(letter)
        assert len(matcher._held) < max(map(len, stops))


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_half_a_character_is_never_sent(tokenizer: Tokenizer, text: str) -> None:
    stream = Detokenizer(tokenizer)
    ids = tokenizer.encode(text.replace("\ufffd", ""), add_special_tokens=False)
    for token in ids:
        assert "\ufffd" not in stream.push(token)


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
    data=st.data(),
)
def test_a_stop_string_is_found_across_any_borders(
    text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    """Nothing of the stop string is sent, and nothing before it is lost."""
    matcher, sent, stopped, rest = StopMatcher(stops, include=include), "", False, text
    while rest and not stopped:
        size = data.draw(st.integers(1, len(rest)))
        piece, stopped = matcher.push(rest[:size])
        sent, rest = sent + piece, rest[size:]
    if stopped:
        seen = text[: len(text) - len(rest)]
        before = sent if not include else next(sent.removesuffix(stop) for stop in stops if sent.endswith(stop))
        assert seen.startswith(before)
        assert any(text[len(before) :].startswith(stop) for stop in stops)
    else:
        assert sent + matcher.flush() == text
        assert not any(stop in text for stop in stops)


def test_a_rendered_chat_never_gets_a_second_bos(chat_tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hello"}]
    rendered = chat_tokenizer.render_chat(messages)
    bos = chat_tokenizer.encode("")[0]
    assert chat_tokenizer.encode(chat_tokenizer.render_chat(messages), add_special_tokens=False)[:2].count(bos) == 1
    assert chat_tokenizer.encode(rendered)[:2].count(bos) == 1
    assert chat_tokenizer.encode("hello")[0] == bos


def test_a_long_text_is_decoded_as_its_parts_are(chat_tokenizer: Tokenizer) -> None:
    ids = chat_tokenizer.encode("the quick brown fox\n", add_special_tokens=False)
    assert chat_tokenizer.decode(ids * 2000) == chat_tokenizer.decode(ids) * 2000


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "non-empty"),
        ("hello", "list"),
        ([{"content": "x"}], r"messages\[0\].*role"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], r"messages\[1\].content"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content"),
    ],
)
def test_messages_of_another_form_are_refused_by_place(chat_tokenizer: Tokenizer, messages: object, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        chat_tokenizer.render_chat(messages)  # type: ignore[arg-type]


def test_a_developers_message_is_the_systems_to_a_template_that_knows_no_developers(chat_tokenizer: Tokenizer) -> None:
    def rendered(role: str) -> str:
        messages = [{"role": role, "content": "Be short."}, {"role": "user", "content": "Hello"}]
        return chat_tokenizer.render_chat(messages)

    assert rendered("developer") == rendered("system") != rendered("user")


def test_text_that_is_no_unicode_is_refused(chat_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="UTF-8"):
        chat_tokenizer.encode("caf\udce9")


def test_a_template_written_for_transformers_says_what_it_says_there(tmp_path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}<s>{{ m['content'] }}"
        "{% endgeneration %}"
        "{% else %}{{ m | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}{% endif %}{% endfor %}"
    )
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(template, "utf-8")
    messages = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "yes"}]
    theirs, _ = render_jinja_template(conversations=[messages], chat_template=template)
    assert Tokenizer(tmp_path).render_chat(messages, add_generation_prompt=False) == theirs[0]


@pytest.mark.parametrize(("least", "sent"), [(0, "ab"), (2, "ab"), (3, "abcab"), (5, "abcab"), (6, "abcabc")])
def test_no_stop_string_ends_an_answer_within_its_least_tokens(tmp_path: Path, least: int, sent: str) -> None:
    tokenizer = written(byte_level(), tmp_path)
    ids = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abcabc"]
    chunks: list[Chunk] = []
    params = SamplingParams(min_tokens=least, max_tokens=6, stop=("c",))
    sink = TextSink(tokenizer, params, 1, None, 0, chunks.append)
    for at, token in enumerate(ids):
        if sink(Token(token, finish_reason="length" if at == 5 else None)):
            break
    assert "".join(chunk.text for chunk in chunks) == sent
    assert chunks[-1].finish_reason == ("length" if sent == "abcabc" else "stop")


@pytest.mark.parametrize(("include", "sent"), [(False, "ab"), (True, "abc")])
def test_a_token_that_only_ends_the_answer_is_text_where_stop_strings_are(
    tmp_path: Path, include: bool, sent: str
) -> None:
    tokenizer = written(byte_level(), tmp_path)
    ids = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abc"]
    params = SamplingParams(stop_token_ids=(ids[-1],), include_stop_str_in_output=include)
    chunks: list[Chunk] = []
    sink = TextSink(tokenizer, params, 1, None, 0, chunks.append)
    for token_id in ids[:-1]:
        sink(Token(token_id))
    sink(Token(ids[-1], finish_reason="stop", is_end=True))
    assert "".join(chunk.text for chunk in chunks) == sent
    assert [chunk.token_ids for chunk in chunks] == [(token_id,) for token_id in ids]


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}", "utf-8")
    with pytest.raises(InvalidRequest, match="refuses"):
        Tokenizer(tmp_path).render_chat([{"role": "user", "content": "x"}])
