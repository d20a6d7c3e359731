"""Filters of one record at a time: broken encodings, lengths, languages."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from stillhouse.engine.errors import UsageError
from stillhouse.tune.data_recipe import Filters
from stillhouse.tune.records import Record, answer_of, prompt_of, text_of
from stillhouse.tune.store import Store

# All control characters but tab, line feed and carriage return; U+FFFD stands where a byte could not be decoded.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")


def drop_filtered(store: Store, options: Filters, start: int = 0) -> None:
    """Drops the records from the number `start` on that one of the filters does not let pass."""
    if options.languages:
        _check_languages(options.languages)
    for number, record in store.living(start):
        for stage, judge in FILTERS.items():
            if reason := judge(record, options):
                store.drop(number, stage, reason)
                break


def encoding_fault(record: Record, options: Filters) -> str | None:
    """Text that was decoded wrongly somewhere on its way: what is left of it teaches nothing."""
    if not options.encoding:
        return None
    text = text_of(record)
    if "\ufffd" in text:
        return "a character that could not be decoded (U+FFFD)"
    if found := _CONTROL.search(text):
        return f"a control character (U+{ord(found[0]):04X})"
    if not text.isascii():
        from ftfy.badness import is_bad

        if is_bad(text):
            return "text decoded as another encoding than its own (mojibake)"
    return None


def length_fault(record: Record, options: Filters) -> str | None:
    """An answer or a prompt outside the lengths asked for."""
    answer, prompt = len(answer_of(record).strip()), len(prompt_of(record).strip())
    if answer < options.min_output_chars:
        return f"the answer has {answer} characters, fewer than {options.min_output_chars}"
    if options.max_output_chars is not None and answer > options.max_output_chars:
        return f"the answer has {answer} characters, more than {options.max_output_chars}"
    if options.max_prompt_chars is not None and prompt > options.max_prompt_chars:
        return f"the prompt has {prompt} characters, more than {options.max_prompt_chars}"
    return None


def language_fault(record: Record, options: Filters) -> str | None:
    """A text that is long enough to tell, and in none of the languages."""
    if not options.languages:
        return None
    text = text_of(record)
    if len(text) < options.language_min_chars:
        return None
    language, confidence = _identifier().classify(text)
    if language in options.languages:
        return None
    return f"the language is {language} ({confidence:.2f}), not {' or '.join(options.languages)}"


FILTERS: dict[str, Callable[[Record, Filters], str | None]] = {
    "encoding": encoding_fault,
    "length": length_fault,
    "language": language_fault,
}


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_pickled_model(MODEL_FILE, norm_probs=True)


def _check_languages(languages: list[str]) -> None:
    known = sorted(_identifier().nb_classes)
    for language in languages:
        if language not in known:
            raise UsageError(f"filters.languages: unknown language {language!r}", hint=f"known: {', '.join(known)}")
