"""Made-up prompts of given lengths: "input=256, output=64", or a distribution in place of a number.

The distributions are uniform(low, high), normal(mean, deviation) and lognormal(mean, deviation), of the lengths
themselves; they are drawn once, by the seed. A prompt's length is in words, each of which is about one token of a
common vocabulary: how many tokens the server made of them is in the result (`prompt_tokens_per_request`).
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from typing import Any

from stillhouse.loadtest.errors import BadInput

_FORM = 'for example --synthetic "input=256, output=64" or "input=normal(256, 64), output=uniform(16, 128)"'
_LENGTH = re.compile(r"(?P<name>uniform|normal|lognormal)\((?P<a>\d+(?:\.\d+)?),(?P<b>\d+(?:\.\d+)?)\)|(?P<fixed>\d+)")
_WORDS = """
time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father
power hour game line end member law car city name team minute idea body back parent face others level office
door health person art war history party result change morning reason research girl guy moment air teacher
force education
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Length:
    """A length and how it is spread."""

    name: str  # "fixed", "uniform", "normal", "lognormal"
    a: float
    b: float = 0.0

    def draw(self, chance: random.Random) -> int:
        if self.name == "uniform":
            return chance.randint(int(self.a), int(self.b))
        if self.name == "normal":
            return max(1, round(chance.gauss(self.a, self.b)))
        if self.name == "lognormal":
            # The parameters of the logarithm, from the mean and deviation of the length itself.
            variance = math.log(1 + (self.b / self.a) ** 2)
            return max(1, round(chance.lognormvariate(math.log(self.a) - variance / 2, math.sqrt(variance))))
        return int(self.a)


@dataclass(frozen=True)
class Synthetic:
    """Lengths of prompts in words, and of answers in tokens (None: as the run says)."""

    input: Length
    output: Length | None

    def prompts(self, count: int, seed: int) -> list[dict[str, Any]]:
        """`count` different prompts, the same for the same seed."""
        chance = random.Random(seed)
        made = []
        for _ in range(count):
            prompt: dict[str, Any] = {"messages": [{"role": "user", "content": words(self.input.draw(chance), chance)}]}
            if self.output is not None:
                prompt["max_tokens"] = self.output.draw(chance)
            made.append(prompt)
        return made


def words(count: int, chance: random.Random) -> str:
    """So many words that say nothing; no two prompts begin alike, or a prefix cache would answer."""
    return " ".join(chance.choice(_WORDS) for _ in range(count))


def parse_synthetic(text: str) -> Synthetic | None:
    """The lengths in `text`; None where it is empty. Raises BadInput."""
    if not text.strip():
        return None
    parts = dict(re.findall(r"(\w+)=([^=]+?)(?:,(?=\w+=)|$)", text.replace(" ", "")))
    if "input" not in parts or not set(parts) <= {"input", "output"}:
        raise BadInput(f"made-up lengths are input=… and perhaps output=…, got {text!r}", hint=_FORM)
    output = parts.get("output")
    return Synthetic(_parse(parts["input"]), None if output is None else _parse(output))


def _parse(text: str) -> Length:
    found = _LENGTH.fullmatch(text)
    if found is None:
        raise BadInput(f"a length is a number, uniform(…), normal(…) or lognormal(…), got {text!r}", hint=_FORM)
    if found["fixed"]:
        length = Length("fixed", float(found["fixed"]))
    else:
        length = Length(found["name"], float(found["a"]), float(found["b"]))
    if length.a < 1 or (length.name == "uniform" and length.b < length.a):
        raise BadInput(f"a length is from 1 upwards, and low is not above high, got {text!r}", hint=_FORM)
    return length
