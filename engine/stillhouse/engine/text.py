"""The text door: tokens from text and chat messages, and text from tokens, piece by piece."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer as RustTokenizer

from stillhouse.engine.errors import InvalidRequest, VersionError
from stillhouse.engine.tool_calls import with_objects

Message = Mapping[str, Any]
# Beside one of these, an assistant's content may be null: clients send back what they got.
_INSTEAD_OF_CONTENT = ("tool_calls", "reasoning_content", "reasoning")
_LARGE_CHARACTERS, _LARGE_TOKENS = 4096, 4096
_REPLACEMENT = "\ufffd"  # what half a character decodes to
# A character has four bytes at most, and a token one at least: before so many no token changes what the last one says.
_CONTEXT_TOKENS = 8


class Tokenizer:
    """A version's tokenizer.json and chat template, without transformers."""

    def __init__(self, directory: Path) -> None:
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise VersionError(f"{file} is missing", hint="build the version again with 'stillhouse build'")
        self._rust = RustTokenizer.from_file(str(file))
        self._rust.no_padding()
        self._rust.no_truncation()
        config_file = directory / "tokenizer_config.json"
        config: dict[str, Any] = json.loads(config_file.read_text("utf-8")) if config_file.is_file() else {}
        self.special_texts = {
            name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        bos = self.special_texts["bos_token"]
        self._bos_id = self._rust.token_to_id(bos) if bos else None
        self.special_ids = frozenset(
            token_id for token_id, token in self._rust.get_added_tokens_decoder().items() if token.special
        )
        self.byte_ids = self._byte_fallback_ids()
        self.template_source = _template_source(directory, config)
        self._template = _compile_template(directory, self.template_source)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; a BOS that the text already begins with is not put in twice.

        Raises InvalidRequest for text that is no Unicode (half a surrogate pair, bytes read as such).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the prompt is not text that UTF-8 can hold: {error.reason}", hint="send it as UTF-8"
            ) from error
        ids: list[int]
        if len(text) < _LARGE_CHARACTERS:
            ids = self._rust.encode(text, add_special_tokens=add_special_tokens).ids
        else:
            # A batch, even of one, is read without Python's lock: other threads go on meanwhile.
            ids = self._rust.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        if len(ids) > 1 and self._bos_id is not None and ids[0] == ids[1] == self._bos_id:
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`, at once."""
        if len(ids) < _LARGE_TOKENS:
            return str(self._rust.decode(list(ids), skip_special_tokens=skip_special_tokens))
        # As encode does: without Python's lock.
        return str(self._rust.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0])

    @functools.cached_property
    def longest_token_bytes(self) -> int:
        """No token stands for more text than this, in UTF-8."""
        return max(len(entry.encode()) for entry in self._rust.get_vocab())

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry, as it is stored; None for an id that has none."""
        entry: str | None = self._rust.id_to_token(token_id)
        return entry

    def ids_beginning_with(self, text: str) -> list[int]:
        """The tokens whose entry begins with `text`, of ASCII's printable letters; reads the whole vocabulary."""
        return sorted(token_id for entry, token_id in self._rust.get_vocab().items() if entry.startswith(text))

    def _byte_fallback_ids(self) -> frozenset[int]:
        """The tokens <0x00> … <0xFF>, where the decoder reads them as bytes (SentencePiece's byte fallback)."""
        found = [self._rust.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        ids = [token_id for token_id in found if token_id is not None]
        if len(ids) < 256 or self.decode([ids[0x41]]) != "A":
            return frozenset()
        return frozenset(ids)

    @property
    def has_chat_template(self) -> bool:
        """Whether the version says how a conversation is written."""
        return self._template is not None

    def template_mentions(self, text: str) -> bool:
        """Whether the chat template has `text` in its source."""
        return text in (self.template_source or "")

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the chat template writes it; `variables` are what else the template is to see.

        A developer's message is the system's to a template that does not know developers, as it is to OpenAI's models
        from before that role: most templates would leave it out. Raises InvalidRequest when a message is no
        {"role": …, "content": …}, the arguments of a call are no JSON, or the template refuses it.
        """
        if self._template is None:
            raise InvalidRequest("this version has no chat template", hint="send plain text instead of messages")
        check_messages(messages)
        messages = [_as_templates_read(said) for said in with_objects(messages)]
        if not self.template_mentions("developer"):
            messages = [{**said, "role": "system"} if said["role"] == "developer" else said for said in messages]
        special = {name: text for name, text in self.special_texts.items() if text is not None}
        try:
            return self._template.render(
                {
                    **special,
                    **(variables or {}),
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # templates are programs: of messages they were not written for they die in any way
            raise InvalidRequest(f"messages: the chat template fails on them: {error}") from error


def check_messages(messages: Any) -> None:
    """Raises InvalidRequest, naming the first message that is not {"role": …, "content": …} in OpenAI's form."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InvalidRequest("messages must be a non-empty list of {role, content} objects")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(f"messages[{index}] must be an object with a role")
        content = message.get("content")
        if content is None and any(message.get(name) for name in _INSTEAD_OF_CONTENT):
            continue
        if not isinstance(content, str):
            raise InvalidRequest(f"messages[{index}].content must be a string")


def _as_templates_read(message: Message) -> dict[str, Any]:
    """Without nulls, which templates may take for what is there, and with thoughts under the name that they know."""
    given = {name: value for name, value in message.items() if value is not None and value != []}
    if isinstance(thoughts := given.get("reasoning"), str):
        given.setdefault("reasoning_content", thoughts)
    return {**given, "content": given.get("content", "")}


class Detokenizer:
    """Text from tokens as they come: the pieces joined are what decoding at once gives.

    Half a character is held back until the rest of it comes, or `flush` is called. Only a short tail of tokens is
    decoded again at each step, however long no character becomes whole.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._tail: list[int] = []  # the last tokens that have a text
        self._sent = 0  # how many characters of their text are sent

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is not whole."""
        if (self._skip and token_id in self._tokenizer.special_ids) or self._tokenizer.token(token_id) is None:
            return ""
        self._tail.append(token_id)
        if token_id in self._tokenizer.byte_ids:
            # Byte fallback reads a run of bytes as a whole: one that is no UTF-8 later on changes all of the run.
            return ""
        text = self._decode()
        # What begins a character decodes to one replacement, what can begin none to one each: all but the last stay.
        whole = len(text) - text.endswith(_REPLACEMENT)
        piece = text[self._sent : whole]
        self._sent = max(self._sent, whole)
        if len(self._tail) > 2 * _CONTEXT_TOKENS:
            unsent = len(text) - self._sent
            self._tail = self._tail[-_CONTEXT_TOKENS:]
            self._sent = len(self._decode()) - unsent
        return piece

    def flush(self) -> str:
        """What is still held back, as it is."""
        piece = self._decode()[self._sent :]
        self._sent += len(piece)
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._tail, skip_special_tokens=self._skip) if self._tail else ""


class StopMatcher:
    """Ends a text before (or behind) the first stop string, also one that comes in pieces."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is safe to send, and whether a stop string was found."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self._held = ""
            return text[: at + len(stop)] if self._include else text[:at], True
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back because it might have begun a stop string."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """The length of the longest proper beginning of `stop` that `text` ends with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def _token_text(value: Any) -> str | None:
    """A special token in tokenizer_config.json is a string or an object with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    source = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
    return source if isinstance(source, str) else None


def _compile_template(directory: Path, source: str | None) -> jinja2.Template | None:
    if source is None:
        return None
    # The settings that chat templates are written for are those of transformers' apply_chat_template.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise VersionError(f"the chat template of {directory} is broken: {error}") from error


class _Generation(jinja2.ext.Extension):
    """{% generation %}: marks what the assistant said, for transformers' training; here it is what is in it."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own way)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
