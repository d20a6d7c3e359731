"""Made-up records for the benchmark of `stillhouse data prepare`, each with what is known of it.

A record is a few sentences of made-up words, some 500 characters. A part of them are copies of others, exact or with a
share of the words replaced; a part give a prompt of the evaluation away; a part are no records at all.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

EXACT_SHARE, NEAR_SHARE, LEAK_SHARE, BAD_SHARE = 0.05, 0.10, 0.01, 0.02
SYLLABLES = [first + vowel for first in "bdfghklmnprstvz" for vowel in "aeiou"]
# Shares of words that are replaced in a near copy: similarities from about 0.97 down to about 0.45.
EDITS = (0.01, 0.03, 0.05, 0.08, 0.12, 0.2)
KEPT = ["copy_of", "leak_of", "number"]
BAD = ("torn", "no output", "a number", "empty", "undecodable", "no object")
PROMPTS = 500
# Of a templated record so many words are the same in all of them: any two are some 0.6 to 0.7 alike.
TEMPLATE_WORDS = 90


class Maker:
    """Records of one seed; `templated`: each answers in one form of words, which is three quarters of its text."""

    def __init__(self, seed: int, *, templated: bool) -> None:
        self.dice = random.Random(seed)
        self.words = ["".join(self.dice.choices(SYLLABLES, k=self.dice.randint(1, 4))) for _ in range(20_000)]
        self.prompts = [self.text(self.dice.randint(4, 20)) for _ in range(PROMPTS)]
        self.template = f"{self.text(TEMPLATE_WORDS)} " if templated else ""
        self.bad: list[int] = []  # lines, from 0, that are no records
        self.asked_words, self.answer_words = ((8, 12), (14, 18)) if templated else ((8, 20), (40, 90))

    def text(self, length: int) -> str:
        return " ".join(self.dice.choices(self.words, k=length)).capitalize() + "."

    def lines(self, count: int) -> Iterator[bytes]:
        """`count` lines of JSONL; a record's number is its line, from 0. What is no record has no number."""
        originals: list[dict[str, Any]] = []  # the latest few hundred, so that memory stays small
        for number in range(count):
            kind = self.dice.random()
            if kind < BAD_SHARE:
                self.bad.append(number)
                yield self._bad() + b"\n"
                continue
            kind -= BAD_SHARE
            if kind < LEAK_SHARE:
                record = self._leak()
            elif originals and kind < LEAK_SHARE + EXACT_SHARE:
                original = self.dice.choice(originals)
                record = {**original, "copy_of": original["number"]}
            elif originals and kind < LEAK_SHARE + EXACT_SHARE + NEAR_SHARE:
                record = self._near_copy(self.dice.choice(originals))
            else:
                record = self._record() | {"number": number}
                originals.append(record)
                if len(originals) > 500:
                    originals.pop(self.dice.randrange(len(originals)))
            yield json.dumps(record | {"number": number}).encode() + b"\n"

    def _record(self) -> dict[str, Any]:
        answer = self.text(self.dice.randint(*self.answer_words))
        return {"instruction": self.text(self.dice.randint(*self.asked_words)), "output": self.template + answer}

    def _near_copy(self, original: dict[str, Any]) -> dict[str, Any]:
        share = self.dice.choice(EDITS)
        own = {"instruction": original["instruction"], "output": original["output"].removeprefix(self.template)}
        edited = {name: self._edited(text, share) for name, text in own.items()}
        return edited | {"output": self.template + edited["output"], "copy_of": original["number"]}

    def _leak(self) -> dict[str, Any]:
        """A prompt of the evaluation as it is, in other letters, within a longer text, or with a word replaced."""
        which = self.dice.randrange(len(self.prompts))
        prompt = self.prompts[which]
        forms = (prompt, prompt.upper(), f"{self.text(5)} {prompt} {self.text(4)}", self._edited(prompt, 0.05))
        return self._record() | {"instruction": self.dice.choice(forms), "leak_of": which}

    def _edited(self, text: str, share: float) -> str:
        dice = self.dice
        return " ".join(dice.choice(self.words) if dice.random() < share else word for word in text.split())

    def _bad(self) -> bytes:
        record = self._record()
        kind = self.dice.choice(BAD)
        if kind == "torn":
            return json.dumps(record).encode()[:-20]
        if kind == "undecodable":
            return json.dumps(record).encode()[:-3] + b'\xe9"}'
        changed = {
            "no output": {"instruction": record["instruction"]},
            "a number": record | {"instruction": 7},
            "empty": record | {"output": "  "},
            "no object": list(record.values()),
        }
        return json.dumps(changed[kind]).encode()
