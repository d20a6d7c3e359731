"""What the gateway counts of a request."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from stillhouse.engine.answer import Chunk
from stillhouse.engine.errors import QueueFull
from stillhouse.engine.sampling import SamplingParams
from stillhouse.gateway.bodies import CompletionBody
from stillhouse.gateway.gateway import Gateway
from stillhouse.gateway.generator import ServedModel
from stillhouse.gateway.job import Job
from stillhouse.gateway.metrics import Meter


class Generator:
    """Answers prompts of up to so many tokens, and has no room for longer ones."""

    async def stream(self, _: Any, prompt_ids: Any, __: Any) -> AsyncGenerator[Chunk, None]:
        if len(prompt_ids) > 10:
            raise QueueFull("it is full")
        yield Chunk("a", (7,), len(prompt_ids), 1)
        yield Chunk("b", (8,), len(prompt_ids), 2, "stop")


async def test_the_tokens_of_a_prompt_count_once_and_those_of_a_refused_one_never() -> None:
    generator: Any = Generator()
    tokenizer: Any = None
    metrics = Gateway().metrics
    model = ServedModel("m", 1, 0, 512, 4, 2048, 512, 100, tokenizer, SamplingParams(), None)

    async def ask(*prompts: list[int], n: int = 1) -> None:
        body = CompletionBody(model="m", prompt=list(prompts), n=n)
        job = Job(generator, model, Meter(metrics), "text_completion", "cmpl", prompts, SamplingParams(), body)
        async for _ in job.chunks(job.tally()):
            pass

    with pytest.raises(QueueFull):
        await ask([5] * 100)
    await ask([5] * 3, [5] * 4, n=3)
    page = metrics.page().decode()
    assert 'stillhouse_gateway_prompt_tokens_total{model_name="m",model_version="1"} 7.0' in page
    assert 'stillhouse_gateway_generation_tokens_total{model_name="m",model_version="1"} 12.0' in page
