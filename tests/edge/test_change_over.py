"""Updates of a device that cannot hold two versions: the old one ends first, and comes back where the new one fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.edge import following, generating, pulling
from stillhouse.edge.following import Follower, Place
from stillhouse.edge.generating import EngineGenerator
from stillhouse.edge.loading import ONE_ANSWER, load
from stillhouse.edge.memory import PROCESS_BYTES, TooLittleMemory, fits_instead
from stillhouse.edge.smoke import check_answers
from stillhouse.engine.directory import open_version
from stillhouse.engine.errors import VersionError
from stillhouse.engine.model import LanguageModel
from stillhouse.engine.policy import live_versions
from stillhouse.engine.sampling import SamplingParams
from stillhouse.gateway.errors import Unavailable

AddVersion = Callable[..., Path]
MODEL = "tiny-fp16"


class Service:
    """A generator on a loop of its own that serves version 1, and a follower that is made to look by the tests."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.loads: list[tuple[str, list[str]]] = []  # the version, and what could not be asked meanwhile
        self.changing: list[bool] = []
        self.broken: set[str] = set()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        first = load(model / "1", ONE_ANSWER)
        self.generator = self.run(self._generator(first))
        self.place = Place(model, follows=True)
        self.follower = Follower({MODEL: self.place}, self.generator, self._load)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    async def answer(self, tokens: int = 3) -> str | None:
        """How an answer of the version that is served now ends."""
        chunks = self.generator.stream(*self._asked(), SamplingParams(max_tokens=tokens, ignore_eos=True))
        return [chunk.finish_reason async for chunk in chunks][-1]

    def look(self) -> None:
        self.follower._look(MODEL, self.place)

    def close(self) -> None:
        self.run(self.generator.close())
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def _generator(self, model: LanguageModel) -> EngineGenerator:
        return EngineGenerator([model])

    def _asked(self) -> tuple[Any, list[int]]:
        (served,) = self.generator.models()
        return served, served.tokenizer.encode("one two three")

    def _load(self, path: Path) -> LanguageModel:
        self.loads.append((path.name, list(self.generator.missing())))
        self.changing.append(self.follower.changing)
        if path.name in self.broken:
            raise VersionError(f"not {path.name}")
        return load(path, ONE_ANSWER)


@pytest.fixture
def service(tmp_path: Path, add_version: AddVersion, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """It serves version 1; version 2 is live, and does not fit beside it."""
    monkeypatch.setattr(generating, "LINGER_S", 0.0)
    add_version(tmp_path, 1)
    service = Service(tmp_path / MODEL)
    add_version(tmp_path, 2)

    def check(path: Path) -> None:
        if not service.generator.missing():
            raise TooLittleMemory(f"{path} does not fit")

    monkeypatch.setattr(following, "check_answers", check)
    yield service
    service.close()


def test_what_runs_ends_then_the_new_version_takes_the_old_ones_place(service: Service) -> None:
    running = asyncio.run_coroutine_threadsafe(service.answer(tokens=200), service.loop)
    service.look()
    assert running.result(60) == "length"
    assert service.loads == [("2", [MODEL])]
    assert service.generator.version_of(MODEL) == 2
    assert live_versions(service.model) == [2]
    assert service.run(service.answer()) == "length"


def test_where_the_new_one_fails_alone_the_old_one_is_loaded_again_and_live(service: Service) -> None:
    service.broken = {"2"}
    service.look()
    assert service.loads == [("2", [MODEL]), ("1", [MODEL])]
    assert service.changing == [True, True] and not service.follower.changing
    assert live_versions(service.model) == [1]
    assert service.run(service.answer()) == "length"
    assert service.generator.fault() is None


def test_where_neither_loads_health_says_so(service: Service) -> None:
    service.broken = {"1", "2"}
    service.look()
    assert "no version of it loads: not 1" in service.run(_fault(service))
    assert service.generator.models() == []


async def _fault(service: Service) -> str:
    return service.generator.fault() or ""


def test_what_would_not_fit_alone_either_ends_nothing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "fits_instead_of", lambda *_: False)
    service.look()
    assert service.loads == []
    assert live_versions(service.model) == [1]
    assert service.run(service.answer()) == "length"


def test_an_answer_that_does_not_end_is_cut(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "DRAIN_S", 0.0)
    running = asyncio.run_coroutine_threadsafe(service.answer(tokens=1500), service.loop)
    service.run(asyncio.sleep(0.1))
    service.look()
    with pytest.raises(Unavailable, match="shutting down"):
        running.result(60)
    assert service.generator.version_of(MODEL) == 2


def test_the_old_versions_weights_count_as_free_and_its_process_does_not(service: Service) -> None:
    manifest = open_version(service.model / "1", verify=False).manifest
    kv_bytes = 256 * manifest.memory.kv_bytes_per_token
    assert fits_instead(manifest, manifest, PROCESS_BYTES + kv_bytes)
    assert not fits_instead(manifest, manifest, PROCESS_BYTES + kv_bytes - 1)


def test_the_asking_process_tells_of_too_little_memory(
    tiny_repository: Path, orin_nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (orin_nano / "proc/meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 100000 kB\n")
    monkeypatch.setenv("STILLHOUSE_EDGE_ROOT", str(orin_nano))
    with pytest.raises(TooLittleMemory, match="the device has available 102 MB"):
        check_answers(tiny_repository / MODEL / "1")


@pytest.mark.parametrize(("fits", "code", "live"), [(True, 0, 2), (False, 1, 1)])
def test_a_pull_leaves_the_asking_to_the_service_where_only_that_can_make_room(
    served: Any, device: Path, fits: bool, code: int, live: int, monkeypatch: pytest.MonkeyPatch,
    pull: Callable[..., int], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def check(path: Path) -> None:
        raise TooLittleMemory(f"{path} does not fit")

    monkeypatch.setattr(pulling, "check_answers", check)
    monkeypatch.setattr(pulling, "fits_instead_of", lambda *_: fits)
    assert pull(served, device) == code
    assert live_versions(device / MODEL) == [live]
    said = capsys.readouterr().err
    assert ("'edge serve' ends that one first" if fits else "end what else uses the memory") in said
    assert (device / MODEL / ".pull-2").is_dir() is not fits, "what was fetched is kept for another pull"
