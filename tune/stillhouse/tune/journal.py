"""The journal of what an endpoint answered, and was paid for: nothing is asked twice."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from dataclasses import asdict
from pathlib import Path

from stillhouse.tune.endpoint import Answer


class Journal:
    """Answers by key, a JSON object a line, synced as they come; the last of a key counts. A context manager.

    A torn last line is one answer less.
    """

    def __init__(self, file: Path) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Answer] = {}
        self._stream = file.open("a+b")
        fcntl.flock(self._stream, fcntl.LOCK_EX)  # another run of the same dataset waits
        self._stream.seek(0)
        whole = 0
        for line in self._stream:
            if not line.endswith(b"\n"):
                self._stream.truncate(whole)
                break
            whole += len(line)
            entry = json.loads(line)
            key = entry.pop("key")
            self._known[key] = Answer(**entry)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def get(self, key: str) -> Answer | None:
        return self._known.get(key)

    def put(self, key: str, answer: Answer) -> None:
        with self._lock:
            self._known[key] = answer
            self._stream.write(json.dumps({"key": key, **asdict(answer)}).encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
