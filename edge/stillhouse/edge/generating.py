"""The engine in this process, as what the gateway speaks to."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterator, Sequence

from stillhouse.engine.answer import Chunk
from stillhouse.engine.model import LanguageModel, Submitted
from stillhouse.engine.sampling import SamplingParams
from stillhouse.gateway.errors import Unavailable
from stillhouse.gateway.generator import Figure, ServedModel, describe

log = logging.getLogger(__name__)

# A request that came before a switch may still be reading its prompt: the old version stays at least so long.
LINGER_S = 5.0
# Where two versions do not fit beside each other, the old one's answers hold the new one up so long at the most.
DRAIN_S = 30.0
_GAUGES = {
    "num_requests_running": "Requests that hold a slot",
    "num_requests_waiting": "Requests that wait for a slot",
    "kv_cache_usage_perc": "Share of the KV cache in use, 0 to 1",
}
_COUNTERS = {
    "prompt_tokens_total": "Prompt tokens processed",
    "generation_tokens_total": "Tokens generated",
}


class EngineGenerator:
    """Loaded models, asked directly; made on the event loop that uses it. Closes them at its end."""

    def __init__(self, models: Sequence[LanguageModel]) -> None:
        self.loop = asyncio.get_running_loop()
        self._models = {model.version.manifest.model: model for model in models}
        self._served = {name: _described(model) for name, model in self._models.items()}
        self._retired: list[LanguageModel] = []
        self._lost: dict[str, str] = {}
        self._streams: Counter[LanguageModel] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    def models(self) -> Sequence[ServedModel]:
        return [served for name, served in self._served.items() if name in self._models]

    def version_of(self, name: str) -> int:
        """The version of the model `name` that gets new requests, or got them last; any thread may ask."""
        return self._served[name].version

    def replace(self, model: LanguageModel) -> None:
        """New requests go to `model` from now on; what runs on the version before ends there, and that is closed."""
        name = model.version.manifest.model
        before, self._models[name], self._served[name] = self._models.get(name), model, _described(model)
        self._lost.pop(name, None)
        if before is not None:
            self._retired.append(before)
            task = self.loop.create_task(self._retire(before))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def release(self, name: str) -> None:
        """Refuses what is new for the model `name`, and closes it once what runs has ended, after DRAIN_S at the most.

        `replace` has it answer again.
        """
        if (model := self._models.pop(name, None)) is not None:
            self._retired.append(model)
            await self._retire(model, DRAIN_S)

    def lose(self, name: str, why: str) -> None:
        """Says of a released model that none will take its place."""
        self._lost[name] = why

    def missing(self) -> dict[str, str]:
        away = [name for name in self._served if name not in self._models]
        return {name: self._lost.get(name, "another version is being loaded in its place") for name in away}

    async def stream(
        self, model: ServedModel, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[Chunk, None]:
        mailbox, engine, ended = _Mailbox(self.loop), self._engine_of(model), False
        self._streams[engine] += 1
        submitted = None
        try:
            submitted = await self._submitted(engine, prompt_ids, params, mailbox)
            while not ended:
                chunk = await mailbox.get()
                ended = chunk.finish_reason is not None
                if chunk.error is not None:
                    raise chunk.error
                if chunk.finish_reason == "cancelled":
                    raise Unavailable("the engine is shutting down")
                yield chunk
        finally:
            self._streams[engine] -= 1
            if not self._streams[engine]:
                del self._streams[engine]
            if submitted is not None and not ended:
                submitted.cancel()

    async def _submitted(
        self, engine: LanguageModel, prompt_ids: Sequence[int], params: SamplingParams, mailbox: _Mailbox
    ) -> Submitted:
        # A grammar may take a moment to compile; nothing else of submit() does.
        if params.structured_outputs is None:
            return engine.submit(prompt_ids, params, mailbox.put)
        submitting = self.loop.run_in_executor(None, engine.submit, prompt_ids, params, mailbox.put)
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:
            # Who asked has gone; the thread submits all the same.
            submitting.add_done_callback(_cancel_what_it_submitted)
            raise

    def _engine_of(self, served: ServedModel) -> LanguageModel:
        """The version that the prompt was read for. Raises Unavailable where it has gone by now."""
        for model in (*self._models.values(), *self._retired):
            manifest = model.version.manifest
            if (manifest.model, manifest.version) == (served.name, served.version):
                return model
        raise Unavailable(f"version {served.version} of {served.name} was replaced meanwhile")

    async def _retire(self, model: LanguageModel, at_most_s: float = math.inf) -> None:
        until_s = self.loop.time() + at_most_s
        await asyncio.sleep(min(LINGER_S, at_most_s))
        while self._streams[model] and self.loop.time() < until_s:
            await asyncio.sleep(0.1)
        self._retired.remove(model)
        await self.loop.run_in_executor(None, model.close)
        log.info("version %d of %s is closed", model.version.manifest.version, model.version.manifest.model)

    def fault(self) -> str | None:
        broken = [name for name, model in self._models.items() if not model.healthy]
        faults = [f"the engine of {', '.join(broken)} has failed"] if broken else []
        faults += [f"{name} cannot answer now: {why}" for name, why in self.missing().items()]
        return "; ".join(faults) or None

    def figures(self) -> Iterator[Figure]:
        for name, model in self._models.items():
            stats, version = model.stats(), model.version.manifest.version
            values = {
                "num_requests_running": stats.running,
                "num_requests_waiting": stats.waiting,
                "kv_cache_usage_perc": stats.kv_tokens_used / max(1, stats.kv_tokens_capacity),
                "prompt_tokens_total": stats.prompt_tokens_total,
                "generation_tokens_total": stats.generation_tokens_total,
            }
            for figure, description in {**_GAUGES, **_COUNTERS}.items():
                yield Figure(figure, description, name, version, values[figure])

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for model in (*self._models.values(), *self._retired):
            await self.loop.run_in_executor(None, model.close)


def _described(model: LanguageModel) -> ServedModel:
    return describe(model.version, model.tokenizer, model.engine.limits)


def _cancel_what_it_submitted(submitting: asyncio.Future[Submitted]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()


class _Mailbox:
    """Chunks from the engine's thread to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._chunks: deque[Chunk] = deque()
        self._filled = asyncio.Event()

    def put(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        try:
            self._loop.call_soon_threadsafe(self._filled.set)
        except RuntimeError:
            # The loop has ended, and with it whoever would have read this.
            return

    async def get(self) -> Chunk:
        while not self._chunks:
            self._filled.clear()
            # A chunk that came in between has set nothing yet, or sets it again.
            if not self._chunks:
                await self._filled.wait()
        return self._chunks.popleft()
