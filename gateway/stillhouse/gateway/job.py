"""One request's answers: which prompts, how many answers to each, with which parameters."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from stillhouse.engine.answer import Chunk
from stillhouse.engine.errors import InvalidRequest
from stillhouse.engine.sampling import SamplingParams
from stillhouse.gateway.answers import merged
from stillhouse.gateway.bodies import GenerationBody
from stillhouse.gateway.generator import Generator, ServedModel
from stillhouse.gateway.metrics import Meter
from stillhouse.gateway.params import answer_params, as_sent


@dataclass(slots=True)
class Tally:
    """Counts tokens as the chunks come by; a prompt counts once, however many answers it has."""

    num_prompt_tokens: int
    _output: dict[int, int] = field(default_factory=dict)
    _thinking: dict[int, int] = field(default_factory=dict)

    def add(self, number: int, chunk: Chunk) -> None:
        self._output[number] = chunk.num_output_tokens
        self._thinking[number] = chunk.num_thinking_tokens

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        completion_tokens = sum(self._output.values())
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.num_prompt_tokens + completion_tokens,
            "completion_tokens_details": {"reasoning_tokens": sum(self._thinking.values())},
        }


@dataclass(frozen=True, slots=True)
class Job:
    """Answer k is answer `k % n` to prompt `k // n`."""

    generator: Generator
    model: ServedModel
    meter: Meter
    kind: str  # of object: "chat.completion" or "text_completion"
    prefix: str  # of the id
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    body: GenerationBody
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_s: int = field(default_factory=lambda: int(time.time()))

    @property
    def n(self) -> int:
        return self.body.n or 1

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * self.n

    async def chunks(self, tally: Tally) -> AsyncGenerator[tuple[int, Chunk], None]:
        """All answers as they come, each chunk with its answer's number; counted in `tally` and for the metrics."""
        params = [answer_params(self.params, index) for index in range(self.n)]
        streams = [
            partial(self.generator.stream, self.model, prompt, params[index])
            for prompt in self.prompts
            for index in range(self.n)
        ]
        self.meter.begin(self.model)
        unanswered = set(range(len(self.prompts)))
        # Closed by hand: an async generator that is left open is ended some time later.
        # As many as run together, so that one request does not fill the engine's queue alone.
        together = self.model.answers_together(max(map(len, self.prompts)), self.params.max_tokens)
        source = merged(streams, together)
        try:
            async for number, chunk in source:
                tally.add(number, chunk)
                if (prompt := number // self.n) in unanswered:
                    # Not before: a prompt that is refused was never read.
                    unanswered.remove(prompt)
                    self.meter.take_prompt(len(self.prompts[prompt]))
                self.meter.take(number, chunk)
                yield number, chunk
        except InvalidRequest as error:
            raise as_sent(error, self.body) from None
        finally:
            await source.aclose()

    def tally(self) -> Tally:
        return Tally(sum(map(len, self.prompts)))

    def head(self, kind: str | None = None) -> dict[str, Any]:
        """The fields that every object of this job begins with."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind or self.kind,
            "created": self.created_s,
            "model": self.model.name,
            "system_fingerprint": f"{self.model.name}-v{self.model.version}",
        }
