"""POST /v1/chat/completions: one conversation, n answers, thoughts apart from content."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from stillhouse.engine.answer import Chunk
from stillhouse.gateway.bodies import ChatBody
from stillhouse.gateway.errors import invalid
from stillhouse.gateway.generator import Generator, ServedModel
from stillhouse.gateway.job import Job, Tally
from stillhouse.gateway.logprobs import Vocabulary, chat_logprobs, prompt_logprobs
from stillhouse.gateway.messages import check_tools
from stillhouse.gateway.metrics import Meter
from stillhouse.gateway.params import sampling_params
from stillhouse.gateway.prompts import chat_ids
from stillhouse.gateway.sse import event
from stillhouse.gateway.thoughts import Splitter


async def chat_job(generator: Generator, model: ServedModel, meter: Meter, body: ChatBody) -> Job:
    """What a chat asks the model. Raises ApiError or StillhouseError for what cannot be asked."""
    check_tools(body, model)
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    if body.max_tokens == 0:
        raise invalid("max_tokens must be at least 1, got 0", "max_tokens")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise invalid("max_tokens and max_completion_tokens differ: give one", "max_completion_tokens")
    prompt_ids = await chat_ids(
        model, body.messages, body.chat_template_kwargs, add_special_tokens=bool(body.add_special_tokens)
    )
    params = sampling_params(
        body,
        model,
        len(prompt_ids),
        body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    return Job(generator, model, meter, "chat.completion", "chatcmpl", [prompt_ids], params, body)


async def chat_completion(job: Job, body: ChatBody) -> dict[str, Any]:
    """The whole answer."""
    tally, vocabulary = job.tally(), _vocabulary(job, body)
    chunks: list[list[Chunk]] = [[] for _ in range(job.n)]
    async for index, chunk in job.chunks(tally):
        chunks[index].append(chunk)
    choices = []
    for index, pieces in enumerate(chunks):
        await asyncio.sleep(0)  # thousands of log-probabilities take a while: the others are served between two answers
        splitter = Splitter(job.model, job.prompts[0], job.params)
        parts = [splitter.push(piece) for piece in pieces]
        thoughts, content = ("".join(part[which] for part in parts) for which in (0, 1))
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if job.model.thinking_tags is not None:
            message["reasoning_content"] = thoughts or None
            if thoughts and not content:
                message["content"] = None
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": chat_logprobs(vocabulary, pieces) if body.logprobs else None,
                "finish_reason": pieces[-1].finish_reason,
            }
        )
    answer = {**job.head(), "choices": choices, "usage": tally.usage()}
    if body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs(vocabulary, chunks[0][0].prompt_logprobs, body.prompt_logprobs)
    return answer


async def chat_events(job: Job, body: ChatBody) -> AsyncGenerator[bytes, None]:
    """The answer as it comes: the roles, then what each chunk brings, then the usage where it was asked for."""
    tally, vocabulary = job.tally(), _vocabulary(job, body)
    splitters = [Splitter(job.model, job.prompts[0], job.params) for _ in range(job.n)]
    options = body.stream_options
    with_usage = options is not None and bool(options.include_usage)
    running_usage = options is not None and bool(options.continuous_usage_stats)
    head = job.head("chat.completion.chunk")

    def choice_event(index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return event({**head, "choices": [choice], **_usage(tally, with_usage, running_usage)})

    begun = False
    async with aclosing(job.chunks(tally)) as chunks:
        async for index, chunk in chunks:
            if not begun:
                # Not before the first chunk: until then an error still has its status.
                begun = True
                for other in range(job.n):
                    yield choice_event(other, {"role": "assistant", "content": ""}, None, None)
            thoughts, content = splitters[index].push(chunk)
            delta = {name: text for name, text in (("reasoning_content", thoughts), ("content", content)) if text}
            logprobs = chat_logprobs(vocabulary, [chunk]) if body.logprobs and chunk.token_ids else None
            if delta or logprobs or chunk.finish_reason is not None:
                yield choice_event(index, delta, logprobs, chunk.finish_reason)
    if with_usage:
        yield event({**head, "choices": [], "usage": tally.usage()})


def _usage(tally: Tally, asked: bool, running: bool) -> dict[str, Any]:
    """What a chunk says of usage: nothing, null (the last one has it), or what it is so far (vLLM's option)."""
    if running:
        return {"usage": tally.usage()}
    return {"usage": None} if asked else {}


def _vocabulary(job: Job, body: ChatBody) -> Vocabulary:
    return Vocabulary(job.model.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
