"""The engine in this process, as what the gateway speaks to."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence

from stillhouse.engine.answer import Chunk
from stillhouse.engine.model import LanguageModel, Submitted
from stillhouse.engine.sampling import SamplingParams
from stillhouse.gateway.errors import Unavailable
from stillhouse.gateway.generator import Figure, ServedModel, describe

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
        self._loop = asyncio.get_running_loop()
        self._models = {model.version.manifest.model: model for model in models}
        self._served = [describe(model.version, model.tokenizer, model.max_model_len) for model in models]

    def models(self) -> Sequence[ServedModel]:
        return self._served

    def missing(self) -> dict[str, str]:
        return {}

    async def stream(
        self, model: ServedModel, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[Chunk, None]:
        mailbox = _Mailbox(self._loop)
        engine = self._models[model.name]
        # A grammar may take a moment to compile; nothing else of submit() does.
        if params.structured_outputs is not None:
            submitting = self._loop.run_in_executor(None, engine.submit, prompt_ids, params, mailbox.put)
            try:
                submitted = await asyncio.shield(submitting)
            except asyncio.CancelledError:
                # Who asked has gone; the thread submits all the same.
                submitting.add_done_callback(_cancel_what_it_submitted)
                raise
        else:
            submitted = engine.submit(prompt_ids, params, mailbox.put)
        ended = False
        try:
            while not ended:
                chunk = await mailbox.get()
                ended = chunk.finish_reason is not None
                if chunk.error is not None:
                    raise chunk.error
                if chunk.finish_reason == "cancelled":
                    raise Unavailable("the engine is shutting down")
                yield chunk
        finally:
            if not ended:
                submitted.cancel()

    def fault(self) -> str | None:
        broken = [name for name, model in self._models.items() if not model.healthy]
        return f"the engine of {', '.join(broken)} has failed" if broken else None

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
        for model in self._models.values():
            await self._loop.run_in_executor(None, model.close)


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
