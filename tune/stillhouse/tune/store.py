"""The records of one run on disk, found by number; what was dropped, where and why.

Memory holds a place in the file (8 bytes) and a mark (1 byte) a record, whatever its length.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from stillhouse.tune.records import Record


class Store:
    """Records in `folder`/records.jsonl; those that are dropped go to `removed` with a stage and a reason."""

    def __init__(self, folder: Path, removed: Path) -> None:
        self._file = (folder / "records.jsonl").open("w+b")
        self._removed = removed.open("w", encoding="utf-8")
        self._offsets = array("Q")
        self._end = 0
        self._alive = bytearray()
        self.dropped: Counter[str] = Counter()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._removed.close()

    def __len__(self) -> int:
        """How many records were ever added; their numbers are those below it."""
        return len(self._offsets)

    def __getitem__(self, number: int) -> Record:
        self._file.seek(self._offsets[number])
        record: Record = json.loads(self._file.readline())
        return record

    def add(self, record: Record) -> int:
        """Appends a record; its number."""
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self._file.seek(self._end)
        self._file.write(line)
        self._offsets.append(self._end)
        self._end += len(line)
        self._alive.append(1)
        return len(self._offsets) - 1

    def alive(self, number: int) -> bool:
        return bool(self._alive[number])

    def count(self) -> int:
        """How many records are left."""
        return self._alive.count(1)

    def living(self, start: int = 0) -> Iterator[tuple[int, Record]]:
        """The records that are left, from the number `start` on, in order; they may be dropped meanwhile."""
        for number in range(start, len(self)):
            if self._alive[number]:
                yield number, self[number]

    def drop(self, number: int, stage: str, reason: str, **details: Any) -> None:
        """Marks the record as gone and writes down why; it must be alive."""
        if not self._alive[number]:
            raise ValueError(f"record {number} was dropped before")
        self._alive[number] = 0
        self.dropped[stage] += 1
        entry = {"stage": stage, "reason": reason, **details, "record": self[number]}
        self._removed.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        """Hands what is written to the system; a full disk shows here."""
        self._file.flush()
        self._removed.flush()
