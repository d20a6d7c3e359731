"""The steps of a preparation as they are told to whoever waits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from stillhouse.build.progress import Reporter


class Steps:
    """Numbers the steps of one run for a reporter; each says how long it took."""

    def __init__(self, reporter: Reporter, count: int) -> None:
        self._reporter, self._count, self._index = reporter, count, 0

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._index += 1
        self._reporter.stage(name, self._index, max(self._count, self._index))
        begun = time.monotonic()
        yield
        self._reporter.done(f"{time.monotonic() - begun:.1f} s")

    def share(self, share: float) -> None:
        """How far the step under way is, 0 to 1."""
        self._reporter.share(share)
