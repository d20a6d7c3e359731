"""Which version of a model answers now, and what is known of it."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from stillhouse.client import AsyncClient
from stillhouse.engine.directory import open_version
from stillhouse.engine.limits import limits_of
from stillhouse.engine.options import read_options
from stillhouse.engine.policy import live_versions
from stillhouse.engine.text import Tokenizer
from stillhouse.gateway.errors import Unavailable
from stillhouse.gateway.generator import ServedModel, describe


class LiveModel:
    """A model of the repository; `live` is the newest live version that has said that it is ready."""

    def __init__(self, directory: Path, engine_options: dict[str, object]) -> None:
        self.name = directory.name
        self._directory = directory
        self._engine_options = engine_options
        self._live: ServedModel | None = None
        self._tokenizers: dict[int, str] = {}  # by version, the hash of its tokenizer
        self._turning = asyncio.Lock()

    @property
    def is_ready(self) -> bool:
        """Whether there is a version that has said so, ever."""
        return self._live is not None

    @property
    def live(self) -> ServedModel:
        if self._live is None:
            raise Unavailable(f"{self.name} has no version that is ready")
        return self._live

    async def follow(self, client: AsyncClient) -> None:
        """Takes the newest of the live versions that is ready, where that is another than before.

        Raises VersionError for a version that cannot be read, ClientError where the server cannot be asked.
        """
        async with self._turning:
            for version in reversed(live_versions(self._directory)):
                if self._live is not None and version == self._live.version:
                    return
                if await client.ready(self.name, version):
                    self._live = await asyncio.get_running_loop().run_in_executor(None, self._read, version)
                    return

    def same_tokens(self, other: ServedModel) -> bool:
        """Whether token ids made for another version mean the same to the live one."""
        known = self._tokenizers
        return known.get(other.version) is not None and known.get(other.version) == known.get(self.live.version)

    def _read(self, number: int) -> ServedModel:
        version = open_version(self._directory / str(number), verify=False)
        options = read_options(self._directory, dict(self._engine_options))
        self._tokenizers[number] = hashlib.sha256((version.path / "tokenizer.json").read_bytes()).hexdigest()
        # As the engine has them; where it has fallen back to the CPU, it has more slots than are made use of here.
        provider = version.manifest.target if options.provider == "auto" else options.provider
        limits = limits_of(version.manifest, options, allocated_whole=provider != "cpu")
        # Triton knows it by its folder's name, whatever it was built as.
        return describe(version, Tokenizer(version.path), limits, name=self.name)
