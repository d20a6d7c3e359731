"""Triton's models as what the gateway speaks to: over the client's gRPC, one stream a request.

A model's process that dies ends none of its streams (Triton 2.51), and a long prefill is silent too. So a model that
has streams but has said nothing for a while is asked a question of one token: for a dead process Triton refuses it
(after a second), and then every stream of the model ends with an error; one that is busy answers when it can.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence

from stillhouse.client import AsyncClient, ClientError, ModelNotFound, Overloaded, TimedOut
from stillhouse.client import Unavailable as ServerUnavailable
from stillhouse.engine.answer import Chunk
from stillhouse.engine.errors import EngineClosed, StillhouseError
from stillhouse.engine.sampling import SamplingParams
from stillhouse.gateway.errors import Unavailable
from stillhouse.gateway.generator import Figure, ServedModel
from stillhouse.serve.live import LiveModel
from stillhouse.serve.translating import chunks_of, engine_error, sampling_fields

log = logging.getLogger(__name__)

_SILENT_S = 0.6
_PROBE_TIMEOUT_S = 3.0
_IDLE_PROBE_S = 10.0
_DOWN_PROBE_S = 0.5
_LOOK_S = 0.2
_END_MARK_S = 1.0
# For a model that neither answers nor is refused: longer than a prefill of the longest prompts on a slow CPU takes.
_HUNG_S = 900.0


class TritonGenerator:
    """Made on the event loop that uses it; `open()` it before the first question."""

    def __init__(self, grpc_url: str, models: Sequence[LiveModel]) -> None:
        self._client = AsyncClient(grpc_url, timeout_s=None, token_timeout_s=None)
        self._models = {model.name: model for model in models}
        self._pulses = {model.name: _Pulse() for model in models}
        self._watching: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open(self) -> TritonGenerator:
        """Reads what is live, and begins to watch. Raises VersionError for a version that cannot be read."""
        self._loop = asyncio.get_running_loop()
        for model in self._models.values():
            await model.follow(self._client)
        self._watching = [asyncio.create_task(self._watch(name)) for name in self._models]
        return self

    def models(self) -> Sequence[ServedModel]:
        return [model.live for model in self._models.values() if model.is_ready]

    def missing(self) -> dict[str, str]:
        none = "no version of it is ready"
        return {name: self._pulses[name].fault or none for name, model in self._models.items() if not model.is_ready}

    async def stream(
        self, model: ServedModel, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[Chunk, None]:
        pulse = self._pulses[model.name]
        if pulse.fault:
            raise Unavailable(f"{model.name} cannot answer now: {pulse.fault}")
        mailbox: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
        pulse.begin(mailbox, model.version)
        pump = asyncio.create_task(self._pump(model, prompt_ids, params, mailbox))
        ended = False
        try:
            while not ended:
                item = await mailbox.get()
                if isinstance(item, Exception):
                    raise item
                ended = item.finish_reason is not None
                yield item
        finally:
            pulse.streams.pop(mailbox, None)
            if ended:
                # The server's end mark follows at once. Cut off before it, the request would count as cancelled, and
                # Triton would keep it (see the client's grpc_wire.py).
                await asyncio.wait([pump], timeout=_END_MARK_S)
            pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pump

    def fault(self) -> str | None:
        faults = {name: pulse.fault for name, pulse in self._pulses.items() if pulse.fault} | self.missing()
        return "; ".join(f"{name} cannot answer now: {reason}" for name, reason in faults.items()) or None

    def figures(self) -> Iterator[Figure]:
        # They are on Triton's own metrics page.
        return iter(())

    async def close(self) -> None:
        for pulse in self._pulses.values():
            pulse.tell(Unavailable("cut off: the server is shutting down, and its grace time is over"))
        self._stop_watching()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await self._client.close()

    def rest(self) -> None:
        """Lets what runs come to its end without asking the models, which refuse what is new; from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop_watching)

    def _stop_watching(self) -> None:
        for task in self._watching:
            task.cancel()

    def suspect(self, name: str) -> None:
        """Has the model asked at once whether it answers; by whoever saw it end or come again, from any thread."""
        if name in self._pulses:
            self._pulses[name].suspected = True

    def fail(self, name: str, version: int, reason: str) -> None:
        """Ends the version's streams with an error; from any thread.

        If it is the live one, new ones are refused until the model answers again.
        """
        if name in self._pulses and self._loop is not None:
            self._loop.call_soon_threadsafe(self._end_version, name, version, reason)

    def _end_version(self, name: str, version: int, reason: str) -> None:
        pulse, model = self._pulses[name], self._models[name]
        if model.is_ready and model.live.version == version:
            pulse.end(name, reason, version)
        else:
            log.warning("%s/%d, which is not live, does not answer: %s", name, version, reason)
            pulse.tell(Unavailable(f"{name}/{version} went down while it answered: {reason}"), version)

    async def _pump(
        self,
        model: ServedModel,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        mailbox: asyncio.Queue[Chunk | Exception],
    ) -> None:
        """Puts the answer's chunks into the mailbox, or the error that ended it."""
        pulse, asked = self._pulses[model.name], model
        while True:
            begun = False
            try:
                async with contextlib.aclosing(
                    self._client.stream(
                        asked.name,
                        input_ids=prompt_ids,
                        version=asked.version,
                        details=True,
                        **sampling_fields(params),
                    )
                ) as tokens:
                    async for token in tokens:
                        begun = True
                        pulse.hear()
                        for chunk in chunks_of(token):
                            mailbox.put_nowait(chunk)
                return
            except ClientError as error:
                successor = None if begun else await self._successor(asked, error)
                if successor is None:
                    log.debug("%s: %s", asked.name, error)
                    meant = engine_error(error, asked.name)
                    if isinstance(meant, (EngineClosed, Unavailable)):
                        self.suspect(model.name)
                    mailbox.put_nowait(meant)
                    return
                asked = successor
                if mailbox in pulse.streams:
                    pulse.streams[mailbox] = asked.version
            except Exception as error:  # the boundary between tasks: the reader of the mailbox raises it
                mailbox.put_nowait(error)
                return

    async def _successor(self, asked: ServedModel, error: ClientError) -> ServedModel | None:
        """The version that has taken the place of the one that was asked, if that is why it refused."""
        if not isinstance(error, (ModelNotFound, ServerUnavailable)) or isinstance(error, Overloaded):
            return None
        model = self._models[asked.name]
        with contextlib.suppress(StillhouseError, ClientError):
            await model.follow(self._client)
        return model.live if model.live.version != asked.version and model.same_tokens(asked) else None

    async def _watch(self, name: str) -> None:
        """Follows which version is live, and whether it answers."""
        pulse, model = self._pulses[name], self._models[name]
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await model.follow(self._client)
                if not model.is_ready:
                    continue
                if pulse.is_hung():
                    pulse.end(name, f"it has said nothing for {_HUNG_S:g} s")
                elif pulse.is_to_be_asked():
                    await self._probe(name)
            except (ClientError, StillhouseError) as error:
                log.debug("%s: %s", name, error)
            except Exception:  # the boundary of a task that must not end
                log.exception("watching %s failed", name)

    async def _probe(self, name: str) -> None:
        """Asks for one token. A refusal is the model's end until it answers again; silence says nothing."""
        pulse, live = self._pulses[name], self._models[name].live
        pulse.asked_s, pulse.suspected = time.monotonic(), False
        tokens = self._client.stream(
            name,
            input_ids=[0],
            version=live.version,
            details=True,
            timeout_s=_PROBE_TIMEOUT_S,
            max_tokens=1,
            temperature=0.0,
            probe=True,
        )
        try:
            async with contextlib.aclosing(tokens):
                async for _ in tokens:
                    pulse.revive(name)
        except Overloaded:
            pulse.revive(name)
        except TimedOut:
            log.debug("%s is busy", name)
        except ClientError as error:
            pulse.end(name, str(engine_error(error, name)), live.version)


class _Pulse:
    """When a model was last heard of, who waits for it, and why it cannot answer (None: it can)."""

    def __init__(self) -> None:
        self.heard_s = self.asked_s = time.monotonic()
        self.suspected = False
        self.fault: str | None = None
        self.streams: dict[asyncio.Queue[Chunk | Exception], int] = {}  # the version that each asks

    def begin(self, mailbox: asyncio.Queue[Chunk | Exception], version: int) -> None:
        if not self.streams:
            # Its silence counts from when somebody waits.
            self.hear()
        self.streams[mailbox] = version

    def hear(self) -> None:
        self.heard_s = time.monotonic()

    def is_hung(self) -> bool:
        return bool(self.streams) and self.fault is None and time.monotonic() - self.heard_s > _HUNG_S

    def is_to_be_asked(self) -> bool:
        patience_s = _DOWN_PROBE_S if self.fault else _SILENT_S if self.streams else _IDLE_PROBE_S
        return self.suspected or time.monotonic() - max(self.heard_s, self.asked_s) > patience_s

    def revive(self, name: str) -> None:
        if self.fault:
            log.warning("%s answers again", name)
        self.fault = None
        self.hear()

    def end(self, name: str, reason: str, version: int | None = None) -> None:
        """It cannot answer: ends the streams of `version`, or all."""
        if self.fault is None:
            log.warning("%s does not answer: %s", name, reason)
        self.fault = reason
        self.tell(Unavailable(f"{name} went down while it answered: {reason}"), version)
        self.hear()

    def tell(self, error: Unavailable, version: int | None = None) -> None:
        """Ends the streams of `version`, or all, with `error`."""
        for mailbox, asked in self.streams.items():
            if version is None or asked == version:
                mailbox.put_nowait(error)
