"""Class balance of the training records: records repeated, or weights.

SMOTE makes new points between the feature vectors of a small class. Between two texts there is no text, so what is
left are repeated records, weights (balanced as scikit-learn's: N / (classes · N of the class)) and new records.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping

from stillhouse.engine.errors import UsageError
from stillhouse.tune.data_recipe import Balance


def check_labels(labels: Counter[str], options: Balance) -> None:
    """Raises UsageError where there is nothing to balance."""
    if options.method == "none":
        return
    if not labels:
        raise UsageError(
            f"balance: {options.method}, but no record has a label", hint='columns = { label = "…" } under [[sources]]'
        )
    if len(labels) == 1:
        only = next(iter(labels))
        raise UsageError(
            f"balance: {options.method}, but every training record has the label {only!r}",
            hint='a balance needs two classes; another column for the label, or method = "none"',
        )


def copies(labels: Mapping[int, str], options: Balance, seed: int) -> list[int]:
    """The numbers of the records to repeat, one entry a copy.

    Each class is brought to `target_share` of the largest, but each record is there `cap` times at most, and records of
    a class are repeated evenly. Records without a label are let be.
    """
    by_label: dict[str, list[int]] = {}
    for number, label in labels.items():
        by_label.setdefault(label, []).append(number)
    target = math.ceil(options.target_share * max(map(len, by_label.values()), default=0))
    dice = random.Random(seed)
    added: list[int] = []
    for label in sorted(by_label):
        numbers = sorted(by_label[label])
        wanted = max(min(target, options.cap * len(numbers)) - len(numbers), 0)
        whole, rest = divmod(wanted, len(numbers))
        added += numbers * whole + sorted(dice.sample(numbers, rest))
    return added


def weights(labels: Counter[str]) -> dict[str, float]:
    """The weight of a record of each class; their mean over the records is 1."""
    total = sum(labels.values())
    return {label: total / (len(labels) * count) for label, count in sorted(labels.items())}
