"""Answers of a given form: JSON schema, regular expression, choice, grammar; by llguidance (guidance-ai)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.engine.errors import InvalidRequest, StillhouseError
from stillhouse.engine.sampling import StructuredOutputs

# What a request may ask to be compiled: seconds, and a lexer that llguidance still takes.
MAX_BYTES, MAX_CHOICES = 1 << 18, 10_000
_LONGEST_FAULT = 300  # in characters
# llguidance shows the place in a listing of lines, with ^ below it; the reason stands before or behind.
_LISTING = re.compile(r"\s*(\d+ \| .*|\^+\s*)")


@dataclass(frozen=True, slots=True)
class GrammarCompiler:
    """Makes constraints for one tokenizer; llguidance is loaded with the first."""

    tokenizer: Any  # llguidance.LLTokenizer
    vocab_size: int

    @classmethod
    def load(cls, directory: Path, vocab_size: int, eos_token_ids: list[int]) -> GrammarCompiler:
        """For the tokenizer.json of the version at `directory`. Raises StillhouseError without llguidance."""
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise StillhouseError(
                "structured outputs need llguidance, which is not installed", hint="pip install llguidance"
            ) from error
        file = (directory / "tokenizer.json").read_text("utf-8")
        return cls(LLTokenizer(file, n_vocab=vocab_size, eos_token=eos_token_ids or None), vocab_size)

    def compile(self, wanted: StructuredOutputs) -> GrammarConstraint:
        """The constraint for one answer. Raises InvalidRequest with what llguidance says of a wrong grammar."""
        from llguidance import LLMatcher

        _hold_size(wanted)
        try:
            grammar = _grammar(wanted)
            fault = LLMatcher.validate_grammar(grammar, self.tokenizer)
        except Exception as error:  # nested too deeply, half a surrogate pair: what cannot even be handed over
            fault = str(error)
        if fault:
            raise InvalidRequest(f"structured_outputs.{wanted.kind} is not valid: {_one_line(fault)}")
        constraint = GrammarConstraint(LLMatcher(self.tokenizer, grammar), self.vocab_size)
        constraint.allowed()  # what is too large shows at the first token: here, and not in the engine's step
        return constraint


class GrammarConstraint:
    """What may come next in one answer."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def copy(self) -> GrammarConstraint:
        """The same for another answer, without compiling it again."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next: (vocab_size,)."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise InvalidRequest(f"structured_outputs: nothing fits the grammar here ({reason})")
        mask = np.zeros(self._vocab_size, np.bool_)
        found = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_)
        mask[: found.size] = found
        return mask

    def push(self, token_id: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)

    @property
    def finished(self) -> bool:
        return bool(self._matcher.is_stopped())


def _one_line(fault: str) -> str:
    """What llguidance says, listing aside; of what is long, begin and end: behind a long regex stands what is wrong."""
    said = " ".join(" ".join(line for line in fault.splitlines() if not _LISTING.fullmatch(line)).split())
    half = _LONGEST_FAULT // 2
    return said if len(said) <= _LONGEST_FAULT else f"{said[:half]} … {said[-half:]}"


def _hold_size(wanted: StructuredOutputs) -> None:
    choices = wanted.value if wanted.kind == "choice" else []
    if len(choices) > MAX_CHOICES:
        raise InvalidRequest(f"structured_outputs.choice has {len(choices)} choices, at most {MAX_CHOICES} are taken")
    size = sum(map(len, choices)) if choices else len(str(wanted.value))
    if size > MAX_BYTES:
        raise InvalidRequest(f"structured_outputs.{wanted.kind} is {size} long, at most {MAX_BYTES} are taken")


def _grammar(wanted: StructuredOutputs) -> str:
    from llguidance import LLMatcher

    if wanted.kind == "json":
        return str(LLMatcher.grammar_from_json_schema(wanted.value))
    if wanted.kind == "json_object":
        return str(LLMatcher.grammar_from_json_schema({"type": "object"}))
    if wanted.kind == "regex":
        return str(LLMatcher.grammar_from_regex(wanted.value))
    if wanted.kind == "choice":
        # As a grammar's alternatives, thousands of choices would be as many rows of a parser's table.
        return str(LLMatcher.grammar_from_regex("|".join(f"(?:{re.escape(choice)})" for choice in wanted.value)))
    return str(LLMatcher.grammar_from_lark(wanted.value))
