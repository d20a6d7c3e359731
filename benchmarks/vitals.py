"""What the processes of a server hold: memory, descriptors, threads; and what its metrics page says."""

from __future__ import annotations

from typing import Any

import psutil
from served import Served

MB = 1e6


def look_at(server: Served) -> dict[str, Any]:
    """{"processes": {role: {pid, rss_bytes, pss_bytes, anonymous_bytes, descriptors, threads}}, figure: value, …}."""
    return {"processes": {role: vitals(process) for role, process in server.processes().items()}, **server.figures()}


def vitals(process: psutil.Process) -> dict[str, int]:
    """PSS counts a page that several processes share once in all: sums over processes have a meaning."""
    memory = _smaps_rollup(process.pid)
    return {
        "pid": process.pid,
        "rss_bytes": memory["Rss"],
        "pss_bytes": memory["Pss"],
        "anonymous_bytes": memory["Anonymous"],
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


def _smaps_rollup(pid: int) -> dict[str, int]:
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:  # noqa: PTH123
        lines = file.read().splitlines()[1:]
    return {name: 1024 * int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
