"""How many requests a model's process still has to end, told in a way that outlives the process."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
from pathlib import Path
from typing import Any

from stillhouse.serve.protocol import UNDER_WAY_FILE

_COUNT = struct.Struct("<q")


class UnderWay:
    """Counts them in a mapped file of `directory`: always up to date, whatever ends the process, on a full disk too.

    The guard asks the file whether it may end the server, the launcher whether a process that has died had clients that
    would wait for ever. Without a directory (no launcher) nobody is told; an empty file, where there was no room for
    more, says that it is not known.
    """

    def __init__(self, directory: Path | None) -> None:
        self._count = 0
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None
        self._file = None if directory is None else directory / f"{UNDER_WAY_FILE}{os.getpid()}"
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write_bytes(_COUNT.pack(0))
                with self._file.open("r+b") as opened:
                    self._map = mmap.mmap(opened.fileno(), _COUNT.size)

    def add(self, change: int) -> None:
        with self._lock:
            self._count += change
            if self._map is not None:
                _COUNT.pack_into(self._map, 0, self._count)

    def close(self) -> None:
        """Takes the file away: this process ends in order."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink()


class CountedSender:
    """Triton's sender of one request, which is under way from now until its final response has been sent."""

    def __init__(self, sender: Any, under_way: UnderWay, final_flag: int) -> None:
        self._sender = sender
        self._under_way = under_way
        self._final_flag = final_flag
        under_way.add(1)

    def send(self, response: Any = None, flags: int = 0) -> None:
        self._sender.send(response, flags=flags)
        if flags & self._final_flag:
            self._under_way.add(-1)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


def told_under_way(directory: Path) -> dict[int, int]:
    """What the processes of a run directory have told, by process; 1 for one that could not."""
    told = {}
    for file in directory.glob(f"{UNDER_WAY_FILE}*"):
        with contextlib.suppress(OSError):  # its process has just ended
            count = file.read_bytes()
            told[int(file.name.removeprefix(UNDER_WAY_FILE))] = (
                _COUNT.unpack(count)[0] if len(count) == _COUNT.size else 1
            )
    return told
