"""The generator: request `number` of a seed is always the same, whichever came before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from attacks import fields, frames
from attacks.attack import Attack

DOORS = ("grpc", "http", "gateway")
_MAKERS = {door: {**fields.makers_of(door), **frames.makers_of(door)} for door in DOORS}
# How often beside the others, which have 1: these take long.
_WEIGHTS = {"prompts of megabytes": 0.15, "slow bodies": 0.15, "deep JSON": 0.7, "grammars": 0.5}


@dataclass(frozen=True, slots=True)
class Generator:
    """Makes hostile requests against one model, each at one of `doors`."""

    seed: int
    model: str
    doors: tuple[str, ...] = DOORS

    def attack(self, number: int) -> Attack:
        random = Random(f"{self.seed}:{number}")
        door = random.choice(self.doors)
        makers = _MAKERS[door]
        (kind,) = random.choices(list(makers), [_WEIGHTS.get(kind, 1.0) for kind in makers])
        made = makers[kind](random, self.model)
        return replace(made, door=door, kind=kind, about=f"{number}: {made.about}")
