"""The processes of a server's models: which run, which have loaded their version, which have died."""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass
from pathlib import Path

from stillhouse.serve.protocol import UNDER_WAY_FILE

# One that Triton has ended itself is a zombie for an instant; one that has died stays one. While a model loads, Triton
# ends its first process itself (it is asked for its configuration), and on a busy machine comes to ask after it late.
_DEAD_AFTER_S = 0.15
_DEAD_LOADING_AFTER_S = 3.0
_PROC = Path("/proc")
# Its first argument is MODEL/VERSION/model.py; Triton starts it by way of a shell.
_STUB = re.compile(r"triton_python_backend_stub\s(.+?)/(\d+)/model\.py\s")


@dataclass(frozen=True, slots=True)
class ModelProcess:
    """The process of one version of a model; `model` is "" for one that died before it could be seen."""

    pid: int
    model: str
    version: int

    def __str__(self) -> str:
        return f"{self.model}/{self.version}" if self.model else "a model"


class Processes:
    """Those of the server that has `run_directory`; looked at several times a second."""

    def __init__(self, run_directory: Path) -> None:
        self._directory = run_directory
        self._known: dict[int, ModelProcess] = {}
        self._zombies: dict[int, float] = {}  # since when
        self._settled: set[int] = set()

    def dead(self) -> list[ModelProcess]:
        """Those that have died and are not settled: Triton does not ask after them, so they stay zombies."""
        now_s, children = time.monotonic(), self._children()
        known = {pid: self._known.get(pid) or _read(pid) for pid in children}
        self._known = {pid: process for pid, process in known.items() if process is not None}
        self._settled &= set(children)  # a number may come again
        self._zombies = {pid: self._zombies.get(pid, now_s) for pid in children if _state(pid) == "Z"}
        zombies = [self._known.get(pid) or ModelProcess(pid, "", 0) for pid in sorted(self._zombies)]
        return [process for process in zombies if process.pid not in self._settled and self._is_dead(process, now_s)]

    def settle(self, process: ModelProcess) -> None:
        """Nothing more is to be done about this one."""
        self._settled.add(process.pid)

    def has_loaded(self, process: ModelProcess) -> bool:
        """Whether it has come so far as to take requests; one that died before holds Triton's load for ever."""
        return (self._directory / f"{UNDER_WAY_FILE}{process.pid}").exists()

    def loaded_versions(self, model: str) -> set[int]:
        """The versions that Triton takes for loaded, those of dead processes too."""
        return {
            process.version
            for process in self._known.values()
            if process.model == model and process.pid not in self._settled and self.has_loaded(process)
        }

    def _is_dead(self, process: ModelProcess, now_s: float) -> bool:
        patience_s = _DEAD_AFTER_S if self.has_loaded(process) else _DEAD_LOADING_AFTER_S
        return now_s - self._zombies[process.pid] >= patience_s

    def _children(self) -> list[int]:
        # By thread, for it is the one that started a process that has it as its child.
        children = list[int]()
        with contextlib.suppress(OSError, ValueError):
            server = int((self._directory / "server.pid").read_text())
            for task in (_PROC / str(server) / "task").iterdir():
                with contextlib.suppress(OSError):
                    children += map(int, (task / "children").read_text().split())
            # The kernel's list may lack some while others end: proc(5).
            children += [pid for pid in self._known if pid not in children and _parent(pid) == server]
        return children


def _read(pid: int) -> ModelProcess | None:
    with contextlib.suppress(OSError):
        command = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        if found := _STUB.search(command):
            return ModelProcess(pid, Path(found.group(1)).name, int(found.group(2)))
    return None


def runs(pid: int) -> bool:
    """False for one that is gone, and for one that has died and is not asked after."""
    return _state(pid) not in (None, "Z")


def stat_of(pid: int) -> list[str]:
    """What /proc/PID/stat says behind the name: the state (Z for a zombie), the parent, …: proc(5). Raises OSError."""
    return (_PROC / str(pid) / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()


def _parent(pid: int) -> int | None:
    """None for one that is gone."""
    with contextlib.suppress(OSError):
        return int(stat_of(pid)[1])
    return None


def _state(pid: int) -> str | None:
    """None for one that is gone."""
    with contextlib.suppress(OSError):
        return stat_of(pid)[0]
    return None
