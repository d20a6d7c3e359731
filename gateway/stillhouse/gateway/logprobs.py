"""Log-probabilities in OpenAI's two forms: that of chats and that of completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

from stillhouse.engine.answer import Chunk
from stillhouse.engine.request import PromptLogprob
from stillhouse.engine.text import Tokenizer

# JSON has no minus infinity; vLLM writes this for a token that was not allowed.
_LEAST = -9999.0
# Text and bytes of the tokens that were asked for before, of each tokenizer as long as it lives: an echo asks for
# thousands, again and again.
_KNOWN: WeakKeyDictionary[Tokenizer, dict[int, tuple[str, bytes]]] = WeakKeyDictionary()


class Vocabulary:
    """What a token id is called; `as_ids`: "token_id:5", which is unique where texts may not be (vLLM's option)."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._known = _KNOWN.setdefault(tokenizer, {})

    def name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._token(token_id)[0]

    def entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        """A token of a chat: its text, its log-probability, its bytes (which alone tell parts of characters apart)."""
        raw = self._token(token_id)[1]
        return {"token": self.name(token_id), "logprob": max(logprob, _LEAST), "bytes": list(raw)}

    def _token(self, token_id: int) -> tuple[str, bytes]:
        known = self._known.get(token_id)
        if known is None:
            raw = token_bytes(self._tokenizer, token_id)
            known = self._known[token_id] = raw.decode("utf-8", "replace"), raw
        return known


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes of a token, as far as they can be known: of byte-level BPE and of SentencePiece they can."""
    stored = tokenizer.token(token_id) or ""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if token_id in tokenizer.byte_ids:
        return bytes([int(stored[3:5], 16)])  # <0x0A>
    if all(letter in _BYTE_OF for letter in stored):
        raw = bytes(_BYTE_OF[letter] for letter in stored)
        if raw.decode("utf-8", "replace") == text:
            return raw
    if stored.startswith("▁"):
        return stored.replace("▁", " ").encode()  # decoding a token alone loses its space
    return text.encode()


def _byte_level_letters() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte, reversed (GPT-2's bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


_BYTE_OF = _byte_level_letters()


def chat_logprobs(vocabulary: Vocabulary, chunks: Sequence[Chunk]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat, over all tokens of `chunks`, thoughts and tags too."""
    content = []
    for chunk in chunks:
        if chunk.logprob is not None:
            for token_id in chunk.token_ids:
                top = [vocabulary.entry(other, logprob) for other, logprob in (chunk.top_logprobs or {}).items()]
                content.append({**vocabulary.entry(token_id, chunk.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def prompt_logprobs(vocabulary: Vocabulary, found: Sequence[PromptLogprob] | None, count: int) -> list[Any]:
    """vLLM's `prompt_logprobs`: one object a token of the prompt, token id → logprob, rank (1: the likeliest) and text.

    Each holds the token itself and the `count` likeliest; the first token, which follows nothing, has null.
    """
    positions: list[Any] = [None]
    for token in found or ():
        ranked = {token.token_id: (token.logprob, token.rank)}
        for rank, (other, logprob) in enumerate(islice(token.top_logprobs.items(), count), start=1):
            ranked.setdefault(other, (logprob, rank))
        positions.append(
            {
                str(other): {"logprob": max(logprob, _LEAST), "rank": rank, "decoded_token": vocabulary.name(other)}
                for other, (logprob, rank) in ranked.items()
            }
        )
    return positions


class CompletionLogprobs:
    """`choices[].logprobs` of a completion, token after token; offsets count from the beginning of its text.

    `count`: how many of the likeliest tokens stand beside each.
    """

    def __init__(self, vocabulary: Vocabulary, count: int) -> None:
        self._vocabulary = vocabulary
        self._count = count
        self._offset = 0
        self._empty()

    def add_prompt(self, prompt_ids: Sequence[int], prompt_logprobs: Sequence[PromptLogprob]) -> None:
        """The echoed prompt, whose first token has no probability."""
        self._add(prompt_ids[0], None, None)
        for found in prompt_logprobs:
            self._add(found.token_id, found.logprob, dict(islice(found.top_logprobs.items(), self._count)))

    def add(self, chunk: Chunk) -> None:
        for token_id in chunk.token_ids:
            self._add(token_id, chunk.logprob, chunk.top_logprobs or {})

    def take(self) -> dict[str, Any]:
        """What was added since the last time."""
        taken = {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top,
            "text_offset": self._offsets,
        }
        self._empty()
        return taken

    def _empty(self) -> None:
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def _add(self, token_id: int, logprob: float | None, top: Mapping[int, float] | None) -> None:
        name = self._vocabulary.name(token_id)
        self._tokens.append(name)
        self._offsets.append(self._offset)
        self._offset += len(name)
        if logprob is None:
            self._logprobs.append(None)
            self._top.append(None)
            return
        named: dict[str, float] = {}
        for other, value in {**(top or {}), token_id: logprob}.items():
            # Two tokens may have the same text: the likelier one stands for both.
            text = self._vocabulary.name(other)
            named[text] = max(value, named.get(text, _LEAST))
        self._logprobs.append(max(logprob, _LEAST))
        self._top.append(named)
