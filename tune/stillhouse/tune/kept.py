"""The columns that a recipe keeps: as values that JSON holds, and masked."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import date, time
from typing import Any


def kept_value(value: Any) -> Any:
    """A column's value as JSON has it: dates in ISO 8601, decimals and the like as text, no number as null.

    Raises ValueError, as a phrase, for what has no text: bytes, and half a character.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {kept_value(str(key)): kept_value(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [kept_value(one) for one in value]
    if isinstance(value, bytes):
        raise ValueError("is bytes, not a text")
    text = value.isoformat() if isinstance(value, (date, time)) else str(value)
    return whole_text(text)


def whole_text(text: str) -> str:
    """The text itself. Raises ValueError, as a phrase, where UTF-8 has no form for it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("has half a character (a lone surrogate)") from None
    return text


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """The value with `change(text)` in place of every text in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: changed(one, change) for key, one in value.items()}
    return [changed(one, change) for one in value] if isinstance(value, list) else value
