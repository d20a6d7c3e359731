"""What is done about models' processes that die; Triton, its processes and their deaths are stood in for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.engine.policy import live_versions, set_live_versions
from stillhouse.serve import restart, supervisor
from stillhouse.serve.backoff import Backoff
from stillhouse.serve.errors import LoadHopeless, ServeError, ServerFailed
from stillhouse.serve.launcher import ServeOptions
from stillhouse.serve.processes import ModelProcess
from stillhouse.serve.supervisor import Supervisor


def test_a_repair_is_at_once_unless_the_one_before_did_not_help() -> None:
    now_s = [1000.0]
    backoff = Backoff(lambda: now_s[0])

    def waits(count: int, life_s: float, *, over: bool = True) -> list[float]:
        said = []
        for _ in range(count):
            said.append(backoff.next_s())
            now_s[0] += said[-1] + 60.0  # a large model
            if over:
                backoff.over()
            now_s[0] += life_s
        return said

    assert waits(8, life_s=3) == [0, 1, 2, 4, 8, 16, 30, 30]
    now_s[0] += 10
    assert waits(3, life_s=11) == [0, 0, 0]
    assert waits(3, life_s=3600, over=False) == [0, 1, 2], "it never came back"


class Waits(Backoff):
    def __init__(self, world: World) -> None:
        super().__init__(lambda: world.now_s)
        self.world = world

    def next_s(self) -> float:
        wait_s = super().next_s()
        return wait_s if self.world.waits_s is None else self.world.waits_s


class World:
    """A server of the models a and b, with a process for each loaded version, and all that was done to it.

    `loads` is what happens at the next loads of a model, by turns: "ok", "dies" (the load never ends), "fails", or
    "ends" (so does the server).
    """

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repository, self.stop, self.now_s = tmp_path / "repository", threading.Event(), 1000.0
        self.processes: dict[ModelProcess, str] = {}  # "loaded", "dead", "dead loading"
        self.settled: list[ModelProcess] = []
        self.told: list[str] = []
        self.done: list[str] = []
        self.loads: list[str] = []
        self.starts: list[str] = []  # whose fault it is that the next starts fail, "" for none
        self.busy = self.unended = False
        self.status: int | None = None  # what the server has ended with
        for model in "ab":
            for version in (1, 2):
                (self.repository / model / str(version)).mkdir(parents=True)
            (self.repository / model / "config.pbtxt").write_text('backend: "stillhouse"\n')
            set_live_versions(self.repository / model, [1])
        monkeypatch.setattr(supervisor, "TritonControl", lambda _: self)
        monkeypatch.setattr(restart, "start_server", self.start)
        monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(supervisor, "_left_unended", lambda _: self.unended)
        monkeypatch.setattr(Supervisor, "_is_busy", lambda _: self.busy)
        self.server: Any = SimpleNamespace(
            models=[SimpleNamespace(name=model) for model in "ab"],
            run_directory=tmp_path,
            processes=self,
            log_file=tmp_path / "log",
            ports=None,
            openai_url=None,
            grpc_url="grpc://127.0.0.1:9",
            exit_status=lambda: self.status,
            stop=lambda **_: self.done.append("stop"),
            wait=lambda _: self.status is not None,
        )
        self.waits_s: float | None = 0.0  # before every repair; None: as a Backoff says
        options = ServeOptions(self.repository)
        self.supervisor = Supervisor(self.server, options, self, self.stop, lambda: Waits(self))
        self.run("a", 1)
        self.run("b", 1)

    def run(self, model: str, version: int, state: str = "loaded") -> ModelProcess:
        process = ModelProcess(len(self.processes) + 1, model, version)
        self.processes[process] = state
        return process

    def policy(self, model: str, *versions: int) -> None:
        set_live_versions(self.repository / model, list(versions))

    def live(self, model: str) -> list[int]:
        return live_versions(self.repository / model)

    def kill(self, model: str, version: int) -> None:
        for process in self.processes:
            if (process.model, process.version) == (model, version):
                self.processes[process] = "dead"

    def look(self, times: int = 1, seconds: float = 0.2) -> None:
        for _ in range(times):
            self.now_s += seconds
            self.supervisor.look()

    # What the gateway's side is told

    def fail(self, name: str, version: int, _: str) -> None:
        self.told.append(f"{name}/{version} died")

    def suspect(self, name: str) -> None:
        self.told.append(f"{name} is back")

    # The processes

    def dead(self) -> list[ModelProcess]:
        return [each for each, state in self.processes.items() if "dead" in state and each not in self.settled]

    def settle(self, process: ModelProcess) -> None:
        self.settled.append(process)

    def has_loaded(self, process: ModelProcess) -> bool:
        return self.processes[process] in ("loaded", "dead")

    def loaded_versions(self, model: str) -> set[int]:
        return {p.version for p in self.processes if p.model == model and self.has_loaded(p) and p not in self.settled}

    # Triton

    def unload(self, model: str, _: Callable[[], str | None]) -> None:
        self.done.append(f"unload {model}")

    def load(self, model: str, hopeless: Callable[[], str | None]) -> None:
        self.done.append(f"load {model} {self.live(model)}")
        how = self.loads.pop(0) if self.loads else "ok"
        if how == "ends":
            self.status = 134
        if how in ("fails", "ends"):
            raise ServeError("no")
        if how == "dies":
            self.run(model, max(self.live(model)), "dead loading")
        if (reason := hopeless()) is not None:
            raise LoadHopeless(reason)

    def ask(self, *_: object) -> None: ...

    def close(self) -> None: ...

    def start(self, options: ServeOptions, *, stop: threading.Event) -> Any:
        assert not stop.is_set()
        self.done.append(f"start {''.join(options.models or ())}")
        if self.starts and (dying := self.starts.pop(0)):
            raise ServerFailed(f"{dying} died", model=dying)
        self.processes.clear()
        self.status = None
        for model in options.models or ():
            self.run(model, 1)
        return self.server


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_a_model_whose_live_process_has_died_is_loaded_again(world: World) -> None:
    world.kill("a", 1)
    world.look(2)
    assert world.done == ["unload a", "load a [1]"]
    assert world.told == ["a/1 died", "a is back"]


def test_one_that_dies_again_while_it_is_loaded_comes_back_with_another_server(world: World) -> None:
    world.kill("a", 1)
    world.loads = ["dies"]
    world.look(2)
    assert world.done == ["unload a", "load a [1]", "stop", "start ab"]
    assert world.told == ["a/1 died", "a is back"]


def test_one_that_dies_in_that_start_too_leaves_the_others_served_until_it_can_be_tried_at_no_cost(
    world: World,
) -> None:
    world.kill("a", 1)
    world.loads, world.starts, world.busy = ["dies"], ["a"], True
    world.look(1)
    assert world.done == ["unload a", "load a [1]", "stop", "start ab", "start b"]
    world.done, world.loads = [], ["dies"]
    world.look(100)
    assert world.done == ["unload a", "load a [1]"], "the other model has requests under way"
    world.busy = False
    world.look(100)
    assert world.done[2:] == ["stop", "start ab"]
    assert world.told[-1] == "a is back"


def test_a_loading_process_that_dies_beside_the_live_version_touches_nothing_but_the_policy(world: World) -> None:
    world.policy("a", 1, 2)
    world.run("a", 2, "dead loading")
    world.busy = True
    world.look(100)
    assert (world.live("a"), world.told, world.done) == ([1], [], [])
    world.policy("a", 1, 2)
    world.look()
    assert world.live("a") == [1], "nor can it be loaded now"
    world.busy = False
    world.look(100)
    assert (world.done, world.told) == (["stop", "start ab"], []), "once, when that costs nobody anything"


def test_where_a_load_is_stuck_the_death_of_the_live_version_is_answered_by_another_server(world: World) -> None:
    world.policy("a", 1, 2)
    world.run("a", 2, "dead loading")
    world.busy = True
    world.look()
    world.kill("a", 1)
    world.look()
    assert world.done == ["stop", "start ab"]


@pytest.mark.parametrize(("loads", "left"), [(["ok", "ok"], [1, 2]), (["ok", "fails"], [2]), (["ok", "dies"], [2])])
def test_a_kept_version_that_dies_is_loaded_again_alone_or_left_out(
    world: World, loads: list[str], left: list[int]
) -> None:
    world.policy("a", 1, 2)
    world.run("a", 2)
    world.kill("a", 1)
    world.loads, world.busy = loads, True
    world.look(100)
    assert world.done == ["load a [2]", "load a [1, 2]"]
    assert (world.told, world.live("a")) == (["a/1 died"], left)


def test_while_a_repair_is_put_off_another_models_death_is_seen(world: World) -> None:
    world.waits_s = 3600.0
    world.kill("a", 1)
    world.look(3)
    world.kill("b", 1)
    world.look(3)
    assert (world.told, world.done) == (["a/1 died", "b/1 died"], []), "each once, and not at every look"
    world.look(seconds=3600.0)
    assert world.done == ["unload a", "load a [1]", "unload b", "load b [1]"]


def test_requests_that_have_no_end_want_another_server(world: World) -> None:
    world.kill("a", 1)
    world.unended = True
    world.look()
    assert world.done == ["stop", "start ab"]


def test_a_server_that_ends_by_itself_is_started_again_with_every_model_when_that_is_due(world: World) -> None:
    world.waits_s = 4.0
    world.status = 134
    world.processes.clear()
    world.look(10)
    assert (world.told, world.done) == (["a is back", "b is back"], []), "both are asked, and found not to answer"
    world.look(20)
    assert world.told == ["a is back", "b is back"] * 2
    assert world.done == ["stop", "start ab"]


def test_the_models_of_other_backends_are_there_again_after_a_restart(world: World) -> None:
    (world.repository / "c" / "1").mkdir(parents=True)
    (world.repository / "c" / "config.pbtxt").write_text('backend: "python"\n')
    world.status = 134
    world.look()
    assert world.done == ["stop", "start abc"]


def test_a_restart_that_fails_is_tried_again_and_blames_none_for_anothers_fault(world: World) -> None:
    """The first fails by itself; then a dies for the memory that b takes, and b alone does not come up either."""
    world.status = 134
    world.starts = ["nobody", "a", "b"]
    world.look()
    assert world.done == ["stop", "start ab", "start ab", "start b", "start ab"]
    assert world.told[2:] == ["a is back", "b is back"]


def test_a_model_that_never_comes_back_does_not_delay_the_others_repair(world: World) -> None:
    world.waits_s = None
    world.loads = ["fails"] * 5
    world.kill("a", 1)
    world.look(130)
    assert world.done == ["unload a", "load a [1]"] * 5, "at once, after 1, 2, 4 and 8 s"
    world.kill("b", 1)
    world.look()
    assert world.done[10:] == ["unload b", "load b [1]"]


def test_a_kept_version_that_dies_with_the_server_stays_in_the_policy(world: World) -> None:
    world.policy("a", 1, 2)
    world.run("a", 2)
    world.kill("a", 1)
    world.loads = ["ends"]
    world.look(2)
    assert (world.live("a"), world.done[1:]) == ([1, 2], ["stop", "start ab"])


def test_a_server_that_ends_while_a_model_is_loaded_again_is_started_at_the_next_look(world: World) -> None:
    world.waits_s = None
    world.loads = ["ends"]
    world.kill("a", 1)
    world.look(2)
    assert world.done == ["unload a", "load a [1]", "stop", "start ab"]


def test_a_server_is_started_again_less_and_less_often_for_a_model_that_never_loads(world: World) -> None:
    world.kill("a", 1)
    world.loads, world.starts = ["dies"] * 50_000, ["a", ""] * 50_000
    world.look(3000)  # ten minutes
    assert 3 <= world.done.count("start ab") <= 8


def test_a_load_is_not_waited_for_once_the_server_is_to_end(world: World) -> None:
    world.kill("a", 1)
    world.stop.set()
    world.look()
    assert world.done == ["unload a", "load a [1]"]
    assert world.told == ["a/1 died"]
