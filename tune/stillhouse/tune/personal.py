"""Personal data that has a form: e-mail addresses, phone, card and identity numbers, found and masked.

Names, addresses and what only its meaning gives away are not found. Card numbers are 13 to 19 digits with a right check
digit (Luhn; ISO/IEC 7812-1); identity numbers are the US social security number in its valid ranges, IBANs with a right
check (ISO 13616), and numbers of 6 digits or more that follow a word such as "passport no.".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

_EMAIL = re.compile(r"(?<!\w)\w[\w.+'-]{0,63}@(?:[\w-]{1,63}\.)+(?:xn--[\w-]{2,59}|[^\W\d_]{2,24})\b")
_DIGITS = re.compile(r"(?<![\w.,-])\d(?:[ -]?\d){12,18}(?![\w-])")
_SSN = re.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?!\w)")
_NAMED_ID = re.compile(
    r"\b((?:passport|id(?:entity)?(?: card)?|ssn|social security|national insurance|tax(?: id)?|driver'?s licen[cs]e)"
    r"(?:\s+(?:number|no\.?|nr\.?)|\s*[:#])(?:\s*:|\s+is)?\s*)((?=(?:[A-Z-]*\d){4})[A-Z0-9-]{6,20})\b",
    re.IGNORECASE,
)
# Starts with +, 00 or (, or is set in groups: a bare run of digits may be anything, an order's number too.
_PHONE = re.compile(
    r"(?<!\d )(?<![\w.,/-])(?:"
    r"\+\d{1,3}(?:[ .()/-]{0,3}\d){6,13}"
    r"|00[1-9]\d{0,2}[ ./-](?:[ .()/-]{0,3}\d){6,13}"
    r"|\(\d{2,5}\)(?:[ .-]?\d){5,9}"
    r"|(?:1[ .-])?\d{3}[ .-]\d{3}[ .-]\d{4}"
    r"|0[1-9](?:[ .-]\d\d){4}(?![ .-]\d)"
    r"|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,5}"
    r")(?![\w-])"
)


class Masker:
    """Masks the kinds asked for, e.g. [EMAIL]; `found` counts what it masked."""

    def __init__(self, kinds: Sequence[str]) -> None:
        # Cards and identity numbers first: a phone's form would take parts of them.
        self.kinds = tuple(kinds)
        self._masks = [mask for kind, mask in _MASKS.items() if kind in kinds]
        self.found: Counter[str] = Counter()

    def __call__(self, text: str) -> str:
        for mask in self._masks:
            text = mask(text, self.found)
        return text


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of those before it."""
    doubled = [int(digit) * 2 if place % 2 else int(digit) for place, digit in enumerate(reversed(digits))]
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def iban_holds(text: str) -> bool:
    """Whether the number modulo 97 is 1, as ISO 13616 asks."""
    plain = text.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(sign, 36)) for sign in plain[4:] + plain[:4])) % 97 == 1


def _emails(text: str, found: Counter[str]) -> str:
    return _replaced(_EMAIL, "email", text, found) if "@" in text else text


def _cards(text: str, found: Counter[str]) -> str:
    return _replaced(_DIGITS, "card", text, found, lambda number: luhn(re.sub(r"\D", "", number)))


def _ids(text: str, found: Counter[str]) -> str:
    text = _replaced(_IBAN, "id", text, found, iban_holds)
    text = _replaced(_SSN, "id", text, found)

    def named(match: re.Match[str]) -> str:
        found["id"] += 1
        return f"{match[1]}[ID]"

    return _NAMED_ID.sub(named, text)


def _phones(text: str, found: Counter[str]) -> str:
    return _replaced(_PHONE, "phone", text, found)


_MASKS: dict[str, Callable[[str, Counter[str]], str]] = {
    "email": _emails,
    "card": _cards,
    "id": _ids,
    "phone": _phones,
}


def _replaced(
    pattern: re.Pattern[str], kind: str, text: str, found: Counter[str], holds: Callable[[str], bool] = bool
) -> str:
    def mask(match: re.Match[str]) -> str:
        if not holds(match[0]):
            return match[0]
        found[kind] += 1
        return f"[{kind.upper()}]"

    return pattern.sub(mask, text)
