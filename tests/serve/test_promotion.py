"""What promote and rollback refuse, and what they write where no server runs."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.engine.errors import UsageError, VersionError
from stillhouse.engine.policy import live_versions, previous_version, set_live_versions
from stillhouse.serve import promotion
from stillhouse.serve.errors import LoadHopeless, PromotionFailed, ServeError
from stillhouse.serve.promotion import built_version, promote, rollback

NOBODY = "grpc://127.0.0.1:9"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of three versions, 1 live; that they are whole is not what is tested here."""
    for number in (1, 2, 3):
        (tmp_path / "tiny-int4" / str(number)).mkdir(parents=True)
    (tmp_path / "tiny-int4" / "config.pbtxt").write_text('backend: "stillhouse"\n')
    set_live_versions(tmp_path / "tiny-int4", [1])
    monkeypatch.setattr(promotion, "open_version", lambda *_, **__: None)
    return tmp_path


def test_rollback_goes_to_the_version_before_and_back(repository: Path) -> None:
    model = repository / "tiny-int4"
    for version in (3, 2):
        assert not promote(repository, "tiny-int4", version, NOBODY).served
    assert (live_versions(model), previous_version(model)) == ([2], 3)
    assert rollback(repository, "tiny-int4", NOBODY).version == 3
    assert rollback(repository, "tiny-int4", NOBODY).version == 2
    assert (model / "config.pbtxt").read_text().count("# live before") == 1


def test_the_version_that_was_kept_goes_when_the_live_one_is_promoted_again(repository: Path) -> None:
    assert promote(repository, "tiny-int4", 2, NOBODY, keep_previous=True).live == [1, 2]
    assert promote(repository, "tiny-int4", 2, NOBODY).live == [2]
    assert previous_version(repository / "tiny-int4") == 1


class Server:
    """A server in explicit mode: it holds what was loaded, as the policy said then; `broken` versions do not answer."""

    def __init__(self, model: Path, loaded: list[int], broken: tuple[int, ...] = ()) -> None:
        self.model, self.loaded, self.broken = model, loaded, broken
        self.calls: list[str] = []
        self.failures: dict[int, BaseException] = {}  # by the number of the load, from 1
        self.meanwhile: Callable[[], object] = lambda: None  # happens in each load

    def must_listen(self) -> None:
        pass

    def live_versions(self, _: str) -> list[int]:
        return self.loaded

    def load(self, _: str, hopeless: Callable[[], str | None]) -> None:
        self.calls.append("load")
        self.meanwhile()
        if len(self.calls) in self.failures:
            raise self.failures[len(self.calls)]
        if (reason := hopeless()) is not None:
            raise LoadHopeless(reason)
        self.loaded = live_versions(self.model)

    def unload(self, _: str, hopeless: Callable[[], str | None]) -> None:
        assert hopeless() is None
        self.loaded = []

    def ask(self, _: str, version: int) -> None:
        if version in self.broken or version not in self.loaded:
            raise ServeError(f"{version} does not answer")

    def close(self) -> None:
        pass


def serving(repository: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[int], *broken: int) -> Server:
    server = Server(repository / "tiny-int4", loaded, broken)
    monkeypatch.setattr(promotion, "TritonControl", lambda _: server)
    return server


@pytest.mark.parametrize(("loaded", "version"), [([], 1), ([], 2), ([1], 2)])
def test_what_a_build_made_is_loaded_where_the_server_answers_and_left_once_it_is_live(
    repository: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[int], version: int
) -> None:
    server = serving(repository, monkeypatch, loaded)
    done = promote(repository, "tiny-int4", version, NOBODY, on_server=True)
    assert (done.served, done.previous) == (True, 1 if version == 2 else None)
    assert server.loaded == live_versions(repository / "tiny-int4") == [version]
    server.calls.clear()
    assert promote(repository, "tiny-int4", version, NOBODY, on_server=True).previous == version
    assert server.calls == []


@pytest.mark.parametrize("version", [1, 2])
def test_what_does_not_come_up_on_a_server_without_the_model_leaves_it_so(
    repository: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    server = serving(repository, monkeypatch, [], version)
    with pytest.raises(PromotionFailed, match=f"{version} does not answer"):
        promote(repository, "tiny-int4", version, NOBODY, on_server=True)
    assert (server.loaded, live_versions(repository / "tiny-int4")) == ([], [1])


@pytest.mark.parametrize(
    ("failure", "said"), [(ServeError("no answer"), PromotionFailed), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_rollback_whose_last_load_fails_changes_nothing_and_can_be_repeated(
    repository: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, said: type[BaseException]
) -> None:
    model = repository / "tiny-int4"
    promote(repository, "tiny-int4", 2, NOBODY)
    server = serving(repository, monkeypatch, [2])
    server.failures = {2: failure}
    with pytest.raises(said):
        rollback(repository, "tiny-int4", NOBODY)
    assert (server.loaded, live_versions(model), previous_version(model)) == ([2], [2], 1)
    assert rollback(repository, "tiny-int4", NOBODY).version == 1
    assert (server.loaded, live_versions(model), previous_version(model)) == ([1], [1], 2)


def test_a_failed_move_remembers_nothing_where_nothing_was_remembered(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serving(repository, monkeypatch, [1])
    server.failures = {2: ServeError("no answer")}
    with pytest.raises(PromotionFailed, match="no answer"):
        promote(repository, "tiny-int4", 2, NOBODY)
    assert (server.loaded, live_versions(repository / "tiny-int4")) == ([1], [1])
    assert previous_version(repository / "tiny-int4") is None


@pytest.mark.parametrize("policy", [[1], [1, 2]])
def test_a_rollback_that_was_killed_on_its_last_step_is_finished_by_the_next_one(
    repository: Path, monkeypatch: pytest.MonkeyPatch, policy: list[int]
) -> None:
    model = repository / "tiny-int4"
    set_live_versions(model, policy, previous=2)
    server = serving(repository, monkeypatch, [1, 2])
    assert rollback(repository, "tiny-int4", NOBODY).version == 1
    assert (server.loaded, live_versions(model), previous_version(model)) == ([1], [1], 2)
    assert rollback(repository, "tiny-int4", NOBODY).version == 2


def test_a_promotion_that_was_killed_on_its_last_step_can_be_rolled_back(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_live_versions(repository / "tiny-int4", [2], previous=1)
    server = serving(repository, monkeypatch, [1, 2])
    assert rollback(repository, "tiny-int4", NOBODY).version == 1
    assert server.loaded == live_versions(repository / "tiny-int4") == [1]


def test_a_version_that_the_launcher_takes_out_of_the_policy_is_not_waited_for(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, server = repository / "tiny-int4", serving(repository, monkeypatch, [1])
    before = (model / "config.pbtxt").read_text()
    server.meanwhile = lambda: set_live_versions(model, [1])
    with pytest.raises(PromotionFailed, match="tiny-int4/2 was not promoted: a process of the model has died"):
        promote(repository, "tiny-int4", 2, NOBODY)
    assert server.calls == ["load"], "another one would wait behind the load that never ends"
    assert (model / "config.pbtxt").read_text() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("load", [1, 2])
def test_a_signal_in_a_move_puts_back_what_was_live(
    repository: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, load: int
) -> None:
    model, server = repository / "tiny-int4", serving(repository, monkeypatch, [1])
    outside = signal.signal(number, signal.SIG_DFL)  # which nohup, say, may have had ignored
    before, handler = (model / "config.pbtxt").read_text(), signal.getsignal(number)

    def send() -> None:  # and once more while it is put back
        if len(server.calls) >= load:
            signal.raise_signal(number)

    server.meanwhile = send
    try:
        with pytest.raises(SystemExit) as ended:
            promote(repository, "tiny-int4", 2, NOBODY)
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, outside)
    assert ended.value.code == 128 + number
    assert ((model / "config.pbtxt").read_text(), server.loaded) == (before, [1])


class Killed(BaseException):
    """SIGKILL: what follows is not done."""


def killed_move(repository: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[int], step: int) -> Server:
    """A promotion to 2 that is killed in its load number `step`; the server goes on to load what it was told to."""
    server = serving(repository, monkeypatch, loaded)
    server.failures = {step: Killed()}
    with monkeypatch.context() as patch:
        patch.setattr(promotion, "_put_back_on_failure", lambda *_, **__: contextlib.nullcontext())
        with pytest.raises(Killed):
            promote(repository, "tiny-int4", 2, NOBODY)
    server.failures = {}
    server.calls.clear()
    return server


@pytest.mark.parametrize("finishes_load", [True, False])
@pytest.mark.parametrize("step", [1, 2])
def test_a_promotion_that_was_killed_is_taken_back_by_rollback(
    repository: Path, monkeypatch: pytest.MonkeyPatch, step: int, finishes_load: bool
) -> None:
    model, server = repository / "tiny-int4", killed_move(repository, monkeypatch, [1], step)
    if finishes_load:
        server.loaded = live_versions(model)
    assert rollback(repository, "tiny-int4", NOBODY).version == 1
    assert server.loaded == live_versions(model) == [1]


@pytest.mark.parametrize("finishes_load", [True, False])
@pytest.mark.parametrize("step", [1, 2])
def test_a_promotion_that_was_killed_is_finished_by_the_next_one_and_can_be_rolled_back(
    repository: Path, monkeypatch: pytest.MonkeyPatch, step: int, finishes_load: bool
) -> None:
    model, server = repository / "tiny-int4", killed_move(repository, monkeypatch, [1], step)
    if finishes_load:
        server.loaded = [1, 2]
    done = promote(repository, "tiny-int4", 2, NOBODY)
    assert (done.version, done.previous, server.loaded, live_versions(model)) == (2, 1, [2], [2])
    assert rollback(repository, "tiny-int4", NOBODY).version == 1


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_build_made_does_not_go_live_where_nobody_listens(repository: Path, version: int) -> None:
    with pytest.raises(ServeError, match="nobody listens"):
        promote(repository, "tiny-int4", version, NOBODY, on_server=True)
    assert live_versions(repository / "tiny-int4") == [1]


def test_a_builds_version_is_read_from_its_folder(tmp_path: Path) -> None:
    def built(model: str, version: int | None) -> int:
        (tmp_path / "build.json").write_text(json.dumps({"results": [{"model": model, "version": version}]}))
        return built_version(tmp_path, "tiny-int4")

    assert built("tiny-int4", 2) == 2
    for model, number, words in (("tiny-int8", 1, "names no version of tiny-int4"), ("tiny-int4", None, "names no")):
        with pytest.raises(UsageError, match=words):
            built(model, number)
    (tmp_path / "build.json").write_text("{}")
    with pytest.raises(UsageError, match="says of no build"):
        built_version(tmp_path, "tiny-int4")


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("tiny-int8", 1, "has no model 'tiny-int8'"),
        ("tiny-int4", 9, "tiny-int4 has no version 9"),
        ("tiny-int4", 1, "tiny-int4/1 is live already"),
    ],
)
def test_what_cannot_be_promoted_is_said_by_name(repository: Path, name: str, version: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        promote(repository, name, version, NOBODY)
    assert live_versions(repository / "tiny-int4") == [1]


def test_there_must_be_something_to_roll_back_to(repository: Path) -> None:
    with pytest.raises(UsageError, match="nothing to roll back to"):
        rollback(repository, "tiny-int4", NOBODY)
    promote(repository, "tiny-int4", 2, NOBODY)
    shutil.rmtree(repository / "tiny-int4" / "1")
    with pytest.raises(UsageError, match="version 1 was removed"):
        rollback(repository, "tiny-int4", NOBODY)


def test_a_version_that_is_not_whole_is_refused_without_a_server_too(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    with pytest.raises(VersionError, match=r"it has no manifest\.json"):
        promote(repository, "tiny-int4", 2, NOBODY)
    assert live_versions(repository / "tiny-int4") == [1]


def test_models_are_loaded_over_grpc_alone(repository: Path) -> None:
    with pytest.raises(UsageError, match="over gRPC"):
        promote(repository, "tiny-int4", 2, "http://127.0.0.1:8000")
