"""Which code comes to a result: a number for each kind of result, raised by hand, and the libraries that it rests on.

They are a part of every hash under which a result is found again, so that after an update what would come to something
else is made anew, and nothing more. Raise the number when the same inputs come to something else than before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

DATA, TUNE, PRUNE, MEASURED = "data", "tune", "prune", "measured"
REVISIONS = {DATA: 1, TUNE: 1, PRUNE: 1, MEASURED: 2}
SCORERS = ("torch", "transformers")  # of perplexities, where the data are held against them
_TRAINERS = (*SCORERS, "peft")
_RESTS_ON = {
    DATA: ("datasketch", "ftfy", "py3langid"),
    TUNE: _TRAINERS,
    PRUNE: _TRAINERS,
    MEASURED: (*_TRAINERS, "tokenizers", "onnxruntime", "numpy"),
}


def code_of(kind: str) -> dict[str, int | str | None]:
    """The revision of the code that comes to a result of this kind, and the versions of its libraries, by name."""
    return {f"code of {kind}": REVISIONS[kind]} | installed(_RESTS_ON[kind])


def installed(names: Sequence[str]) -> dict[str, int | str | None]:
    """The versions of packages; None for one that is not on this machine (a cluster has it)."""
    found: dict[str, int | str | None] = dict.fromkeys(names)
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
