"""Text in pieces equals text at once, for any tokenizer of the two kinds in use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from stillhouse.engine.answer import Chunk, TextSink
from stillhouse.engine.errors import InvalidRequest
from stillhouse.engine.request import Token
from stillhouse.engine.sampling import SamplingParams
from stillhouse.engine.text import Detokenizer, StopMatcher, Tokenizer

CORPUS = ["the quick brown fox", "naïve café, 你好世界", "emoji 👩‍👩‍👧 🎉", "def f(x):\n    return x"] * 5
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def byte_level() -> RustTokenizer:
    """As in GPT-2, Llama 3, Qwen, SmolLM: every token is bytes."""
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def byte_fallback() -> RustTokenizer:
    """As in Llama 2 and Mistral: words with ▁, and <0xNN> for what the vocabulary lacks."""
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ["▁", "▁the", "▁a", "a", "e", "t", "h", "n", "é", "你"]:
        vocab[piece] = len(vocab)
    tokenizer = RustTokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=["byte-level", "byte-fallback"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return written(request.param(), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return written(byte_level(), tmp_path_factory.mktemp("chat"))


def written(rust: RustTokenizer, directory: Path) -> Tokenizer:
    rust.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (directory / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return Tokenizer(directory)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_detokenising_in_pieces_equals_at_once(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """For any token ids at all: whole characters, halves of them, bytes that are none, special tokens."""
    size = tokenizer._rust.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=40))
    skip = data.draw(st.booleans())
    stream = Detokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [*(stream.push(token) for token in ids), stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


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


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}", "utf-8")
    with pytest.raises(InvalidRequest, match="refuses"):
        Tokenizer(tmp_path).render_chat([{"role": "user", "content": "x"}])
