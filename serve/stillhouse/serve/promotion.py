"""Versions go live and back, with or without a server that runs.

Triton routes requests without a version to the highest live one, and keeps what runs on a version to its end when the
version leaves. So the new version is loaded beside the old one (both in the policy), where its process hashes its files
and answers a question of its own before it counts as loaded; then it is asked through the server; then the policy names
it alone, or with the one before. Which one was live is written down before the policy is first changed: whatever kills
a move, the next one finishes it or takes it back.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from stillhouse.client import ClientError
from stillhouse.engine.directory import locked, model_directories, open_version, version_numbers
from stillhouse.engine.errors import StillhouseError, UsageError, VersionError
from stillhouse.engine.policy import CONFIG, live_versions, named_versions, previous_version, set_live_versions
from stillhouse.serve.control import TritonControl
from stillhouse.serve.errors import LoadHopeless, PromotionFailed

_PUT_BACK_S = 60.0


@dataclass(frozen=True, slots=True)
class Promoted:
    """What is live now, what was before, and what the server at the URL has to do with it."""

    model: str
    version: int
    previous: int | None
    live: list[int]
    served: bool  # False: no server serves the model there, only the policy was set


def promote(
    repository: Path, name: str, version: int, url: str, *, keep_previous: bool = False, on_server: bool = False
) -> Promoted:
    """Makes `version` the one that answers; the one before ends its streams and goes, or stays warm.

    `url` is the server's gRPC address; where nobody serves the model there, only the policy is set, and a version that
    is live already is refused. `on_server` asks for the version on the server itself: one that is live there is left as
    it is, a model that is not loaded is loaded, and that nobody listens is an error.

    Raises UsageError for what cannot be asked for, VersionError for a version that is not whole, ServeError where
    nobody listens, PromotionFailed where it does not come up: then nothing has changed, and what was live before has
    served all the time.
    """
    directory = _directory_of(repository, name)
    with locked(directory), contextlib.closing(TritonControl(url)) as server:
        if on_server:
            server.must_listen()
            policy = _policy_of(directory)
            if policy[-1:] == [version] and server.live_versions(name) == policy:
                return Promoted(name, version, version, policy, True)
        return _move(directory, version, server, keep_previous=keep_previous, on_server=on_server)


def rollback(repository: Path, name: str, url: str) -> Promoted:
    """Makes the version live again that was live before; see `promote`."""
    directory = _directory_of(repository, name)
    with locked(directory), contextlib.closing(TritonControl(url)) as server:
        previous = previous_version(directory)
        policy = _policy_of(directory)
        if previous is not None and previous in server.live_versions(name)[-1:] and previous not in policy[:-1]:
            # It has never stopped to answer: a move away from it, to a lower one, was killed, and is finished now.
            previous = next((version for version in reversed(policy) if version != previous), None)
        if previous is None:
            raise UsageError(f"{name}: there is nothing to roll back to", hint="no version was live before this one")
        if previous not in version_numbers(directory):
            raise UsageError(
                f"{name}: there is nothing to roll back to: version {previous} was removed",
                hint=f"promote another: {_numbers(version_numbers(directory))}",
            )
        return _move(directory, previous, server)


def _move(
    directory: Path, version: int, server: TritonControl, *, keep_previous: bool = False, on_server: bool = False
) -> Promoted:
    name, policy = directory.name, _policy_of(directory)
    served = server.live_versions(name)
    before = served or policy
    current = before[-1] if before else None
    live = [current, version] if keep_previous and current is not None else [version]
    settled = before == policy and (bool(served) or not on_server)
    _check(name, version, there=version_numbers(directory), live=live, before=before, settled=settled)
    open_version(directory / str(version), verify=True)
    remembered = current if current != version else None
    if served or on_server:
        with _put_back_on_failure(directory, before, server, f"{name}/{version}", served=bool(served)):
            set_live_versions(directory, sorted({*served, *live}), previous=remembered)
            server.load(name, lambda: _taken_out(directory, version))
            server.ask(name, version)
            set_live_versions(directory, live)
            if served:
                server.load(name, lambda: _taken_out(directory, version))
    else:
        set_live_versions(directory, live, previous=remembered)
    previous = current if served or current != version else None  # a version that nobody had loaded was not live before
    if current == version and before != live:  # the move was begun before, by one that was killed
        previous = previous_version(directory) or previous
    return Promoted(name, version, previous, live, bool(served) or on_server)


def _check(name: str, version: int, *, there: list[int], live: list[int], before: list[int], settled: bool) -> None:
    """Raises UsageError for a version that is not there, is live, or cannot be the default beside the one before."""
    if version not in there:
        raise UsageError(f"{name} has no version {version}", hint=f"it has: {_numbers(there)}")
    if settled and before and version == before[-1] and (len(live) > 1 or before == live):
        raise UsageError(f"{name}/{version} is live already", hint=f"versions there: {_numbers(there)}")
    if live != sorted(live):
        raise UsageError(
            f"{name}/{live[0]} cannot be kept beside {version}: requests without a version go to the highest live one",
            hint="leave out --keep-previous",
        )


@contextlib.contextmanager
def _put_back_on_failure(
    directory: Path, before: list[int], server: TritonControl, what: str, *, served: bool
) -> Iterator[None]:
    """Whatever goes wrong within, Ctrl-C, SIGTERM and SIGHUP too: policy and server have again what was live before.

    And what was live before that one is remembered again.
    """
    text = (directory / CONFIG).read_text("utf-8")
    with _signals_raised():
        try:
            yield
        except BaseException as error:
            if before:
                set_live_versions(directory, before, text=text)
            if not isinstance(error, LoadHopeless):  # whose end every other load would wait for
                until_s = time.monotonic() + _PUT_BACK_S
                with contextlib.suppress(StillhouseError, ClientError):
                    (server.load if served else server.unload)(
                        directory.name, lambda: "it takes too long" if time.monotonic() > until_s else None
                    )
            if not isinstance(error, (StillhouseError, ClientError)):
                raise
            hint = f"{directory.name}/{_numbers(before)} has served all the time; the server's log says more"
            if not served:
                hint = f"{directory.name} was not loaded before, nor is it now; the server's log says more"
            raise PromotionFailed(f"{what} was not promoted: {error}", hint=hint) from error


@contextlib.contextmanager
def _signals_raised() -> Iterator[None]:
    """SIGTERM and SIGHUP are raised as SystemExit, once: what they interrupt is put in order without another."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        if before[number] is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _taken_out(directory: Path, version: int) -> str | None:
    """Why there is no use in waiting for the load: the launcher has taken the version out of the policy."""
    named = named_versions((directory / CONFIG).read_text("utf-8"))
    if named is None or version in named:
        return None
    return (
        "a process of the model has died while it was loading, and Triton waits for it; stillhouse serve starts Triton"
        " again once no request has been under way for a while"
    )


def built_version(folder: Path, name: str) -> int:
    """The version of `name` that `stillhouse build --output FOLDER` made or found. Raises UsageError for none."""
    file = folder / "build.json"
    try:
        results = json.loads(file.read_text("utf-8"))["results"]
        versions = {result["model"]: result["version"] for result in results}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} says of no build: {error}", hint="'stillhouse build --output' writes it") from None
    if versions.get(name) is None:
        raise UsageError(f"{file} names no version of {name}", hint=f"it has: {', '.join(versions) or 'nothing'}")
    return int(versions[name])


def _directory_of(repository: Path, name: str) -> Path:
    directories = {directory.name: directory for directory in model_directories(repository)}
    if name not in directories:
        raise UsageError(
            f"{repository} has no model {name!r}",
            hint=f"it has: {', '.join(directories)}" if directories else "name another with --repository",
        )
    return directories[name]


def _policy_of(directory: Path) -> list[int]:
    # A policy that names a version that is gone is what a promotion mends.
    with contextlib.suppress(VersionError):
        return live_versions(directory)
    return []


def _numbers(versions: list[int]) -> str:
    return ", ".join(map(str, versions)) or "none"
