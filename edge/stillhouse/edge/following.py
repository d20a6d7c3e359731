"""Which version is live on this device, and the switch to another one while the one before goes on answering."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

from stillhouse.edge.generating import EngineGenerator
from stillhouse.edge.loading import fits_instead_of
from stillhouse.edge.memory import TooLittleMemory
from stillhouse.edge.smoke import Interrupted, check_answers
from stillhouse.engine.directory import MANIFEST, locked, version_numbers
from stillhouse.engine.errors import NotThereError, StillhouseError
from stillhouse.engine.model import LanguageModel
from stillhouse.engine.policy import live_versions, previous_version, set_live_versions

log = logging.getLogger(__name__)

Load = Callable[[Path], LanguageModel]
_EVERY_S = 1.0


@dataclass(slots=True)
class Place:
    """Where a model is served from: its directory, whose live version is followed, or one version and no other."""

    directory: Path
    follows: bool

    @classmethod
    def of(cls, path: Path) -> Place:
        """What is neither a version nor a directory of versions is taken for a version; loading it says what it is."""
        if not (path / MANIFEST).is_file() and version_numbers(path):
            return cls(path, follows=True)
        return cls(path, follows=False)

    @property
    def live(self) -> Path:
        """The version that is to answer. Raises StillhouseError where there is none."""
        if not self.follows:
            return self.directory
        if not (live := live_versions(self.directory)):
            raise NotThereError(f"{self.directory} has no version", hint="fetch one with 'stillhouse edge pull URL'")
        return self.directory / str(live[-1])


def load_live(place: Place, load: Load) -> LanguageModel:
    """The live version, or the one before it where the live one does not load; that one is live again then.

    Raises what loading the live version raised where there is none before it that loads.
    """
    path = place.live
    try:
        return load(path)
    except StillhouseError as error:
        before = previous_version(place.directory) if place.follows else None
        if before is None or str(before) == path.name or not (place.directory / str(before)).is_dir():
            raise
        log.error("version %s does not load: %s; going back to version %d", path.name, error, before)
        try:
            model = load(place.directory / str(before))
        except StillhouseError as another:
            log.error("nor does version %d: %s", before, another)
            raise error from another
        go_back(place.directory, int(path.name), before)
        return model


def go_back(directory: Path, failed: int, before: int) -> None:
    """Makes `before` live again in the place of `failed`; on a read-only file system that holds until the end."""
    try:
        with locked(directory):
            if live_versions(directory) == [failed]:
                set_live_versions(directory, [before], previous=failed)
    except OSError as error:
        log.error("version %d stays named as live in %s: %s", failed, directory, error.strerror)


class Follower:
    """Looks every second which version is live, and has the generator switch to it once it has answered."""

    def __init__(self, places: dict[str, Place], generator: EngineGenerator, load: Load) -> None:
        self._places = {name: place for name, place in places.items() if place.follows}
        self._generator = generator
        self._load = load
        self._refused: dict[str, Path] = {}
        self._unclear: dict[str, str] = {}
        self._ended = threading.Event()
        self.changing = False  # one version has ended, and another is being loaded in its place
        self._thread = threading.Thread(target=self._run, name="stillhouse-follower", daemon=True)

    def start(self) -> None:
        if self._places:
            self._thread.start()

    def stop(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            for name, place in self._places.items():
                self._look(name, place)

    def _look(self, name: str, place: Place) -> None:
        try:
            self._follow(name, place)
            self._unclear.pop(name, None)
        except (StillhouseError, OSError) as error:
            # Once, and not every second.
            if self._unclear.get(name) != str(error):
                log.warning("cannot tell which version of %s is live: %s", name, error)
            self._unclear[name] = str(error)
        finally:
            self.changing = False

    def _follow(self, name: str, place: Place) -> None:
        current = self._generator.version_of(name)
        path = place.live
        if int(path.name) == current:
            self._refused.pop(name, None)  # named once more, it is tried once more
            return
        if path == self._refused.get(name):
            return
        log.info("version %s of %s is live: loading it beside version %d", path.name, name, current)
        before = place.directory / str(current)
        model: LanguageModel | None
        try:
            model = self._tried(path)
        except Interrupted:  # with this service, it may be: that says nothing against the version
            return
        except StillhouseError as error:
            if not (isinstance(error, TooLittleMemory) and fits_instead_of(path, before)):
                self._refuse(name, path, before, error)
                return
            self.changing = True
            model = self._tried_instead(name, path, before)
        if model is not None:
            self._take(name, model)

    def _tried_instead(self, name: str, path: Path, before: Path) -> LanguageModel | None:
        """Ends the version `before` to make room for `path`; where that does not answer, `before` loaded again."""
        log.warning("version %s of %s does not fit beside version %s, which ends first", path.name, name, before.name)
        self._on_loop(self._generator.release(name))
        try:
            gc.collect()
            return self._tried(path)
        except Interrupted:
            if self._ended.wait(_EVERY_S):
                return None
            self._refused[name] = path
        except StillhouseError as error:
            self._refuse(name, path, before, error)
        # Out of the handlers: an error's frames hold what was loaded until it was raised.
        try:
            gc.collect()
            return self._load(before)
        except StillhouseError as error:
            log.error("version %s of %s does not load again: %s", before.name, name, error)
            self._generator.loop.call_soon_threadsafe(self._generator.lose, name, f"no version of it loads: {error}")
            return None

    def _tried(self, path: Path) -> LanguageModel:
        check_answers(path)
        return self._load(path)

    def _refuse(self, name: str, path: Path, before: Path, error: StillhouseError) -> None:
        self._refused[name] = path
        log.error("version %s of %s is not taken: %s; version %s goes on", path.name, name, error, before.name)
        go_back(path.parent, int(path.name), int(before.name))

    def _take(self, name: str, model: LanguageModel) -> None:
        if self._ended.is_set():
            model.close()
            return
        self._on_loop(self._switch(model))
        log.info("version %d of %s answers", model.version.manifest.version, name)

    def _on_loop(self, work: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._generator.loop).result()

    async def _switch(self, model: LanguageModel) -> None:
        self._generator.replace(model)
