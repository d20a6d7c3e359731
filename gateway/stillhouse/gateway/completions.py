"""POST /v1/completions: prompts as text or token ids, one or many; echoed with their log-probabilities on request."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from stillhouse.engine.answer import Chunk
from stillhouse.gateway.bodies import CompletionBody
from stillhouse.gateway.errors import invalid
from stillhouse.gateway.generator import Generator, ServedModel
from stillhouse.gateway.job import Job, Tally
from stillhouse.gateway.logprobs import CompletionLogprobs, Vocabulary, prompt_logprobs
from stillhouse.gateway.metrics import Meter
from stillhouse.gateway.params import COMPLETION_TOKENS, sampling_params
from stillhouse.gateway.prompts import given_ids, text_ids, texts_of
from stillhouse.gateway.sse import event

MAX_ANSWERS = 4096
MAX_PROMPT_LOGPROBS = 2**20  # held until their answer is sent, some hundred bytes each


async def completion_job(generator: Generator, model: ServedModel, meter: Meter, body: CompletionBody) -> Job:
    """What a completion asks the model. Raises ApiError or StillhouseError for what cannot be asked."""
    if body.suffix:
        raise invalid("suffix: no model here fills in the middle", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid("best_of: every answer that is made is returned; leave it out or give n", "best_of")
    max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise invalid("max_tokens must be at least 1 where nothing is echoed, got 0", "max_tokens")
    prompts = await _ids(model, body)
    # The echo has as many beside each token as `logprobs` says; the engine finds them once for both.
    scored = [count for count in (body.prompt_logprobs, body.logprobs if body.echo else None) if count is not None]
    if scored:
        _refuse_too_many_logprobs((body.n or 1) * sum(map(len, prompts)), max(scored))
    params = sampling_params(
        body,
        model,
        max(map(len, prompts)),
        max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=max(scored, default=None),
    )
    return Job(generator, model, meter, "text_completion", "cmpl", prompts, params, body)


def _refuse_too_many_logprobs(tokens: int, alternatives: int) -> None:
    if (count := tokens * (1 + alternatives)) > MAX_PROMPT_LOGPROBS:
        raise invalid(
            f"prompts of {tokens:,} tokens with {alternatives} alternatives each make {count:,} log-probabilities,"
            f" more than {MAX_PROMPT_LOGPROBS:,}: send them in several requests",
            "prompt",
        )


def given_prompts(body: CompletionBody) -> list[str] | list[list[int]]:
    """The prompts one by one: a text, texts, token ids, or lists of token ids."""
    prompt: Any = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if len(prompt) * (body.n or 1) > MAX_ANSWERS:
        raise invalid(f"prompt and n ask for more than {MAX_ANSWERS} answers: send them in several requests", "prompt")
    if not prompt or not all(prompt):
        raise invalid("prompt must not be empty", "prompt")
    return list(prompt)


async def completion(job: Job, body: CompletionBody) -> dict[str, Any]:
    """The whole answers."""
    tally, answers = job.tally(), await _answers(job, body)
    texts, reasons = [""] * job.num_answers, [""] * job.num_answers
    async for number, chunk in job.chunks(tally):
        texts[number] += answers[number].text(chunk)
        reasons[number] = chunk.finish_reason or ""
    choices = [
        {
            "index": number,
            "text": text,
            "logprobs": answers[number].logprobs(),
            "finish_reason": reasons[number],
            **({} if body.prompt_logprobs is None else {"prompt_logprobs": answers[number].prompt_logprobs}),
        }
        for number, text in enumerate(texts)
    ]
    return {**job.head(), "choices": choices, "usage": _usage(tally, body)}


async def completion_events(job: Job, body: CompletionBody) -> AsyncGenerator[bytes, None]:
    """The answers as they come, the echoed prompt first; then the usage where it was asked for."""
    tally, answers = job.tally(), await _answers(job, body)
    options = body.stream_options
    with_usage = options is not None and bool(options.include_usage)
    running_usage = options is not None and bool(options.continuous_usage_stats)
    head = job.head()
    async with aclosing(job.chunks(tally)) as chunks:
        async for number, chunk in chunks:
            text, logprobs = answers[number].text(chunk), answers[number].logprobs()
            if text or chunk.finish_reason is not None or (logprobs and logprobs["tokens"]):
                choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": chunk.finish_reason}
                usage = {"usage": _usage(tally, body) if running_usage else None} if with_usage or running_usage else {}
                yield event({**head, "choices": [choice], **usage})
    if with_usage:
        yield event({**head, "choices": [], "usage": _usage(tally, body)})


class _Answer:
    """What the chunks of one answer bring, with the echo before it."""

    def __init__(
        self, vocabulary: Vocabulary, body: CompletionBody, prompt_ids: Sequence[int], echo: str | None
    ) -> None:
        self._logprobs = None if body.logprobs is None else CompletionLogprobs(vocabulary, body.logprobs)
        self._vocabulary = vocabulary
        self._prompt_count = body.prompt_logprobs
        self.prompt_logprobs: list[Any] | None = None
        self._prompt_ids = prompt_ids
        self._echo = echo
        self._prompt_alone = body.max_tokens == 0

    def text(self, chunk: Chunk) -> str:
        """The text that this chunk adds; with the first one comes the prompt."""
        before = ""
        if self._prompt_count is not None and self.prompt_logprobs is None:
            self.prompt_logprobs = prompt_logprobs(self._vocabulary, chunk.prompt_logprobs, self._prompt_count)
        if self._echo is not None:
            before, self._echo = self._echo, None
            if self._logprobs is not None:
                self._logprobs.add_prompt(self._prompt_ids, chunk.prompt_logprobs or [])
        if self._prompt_alone:
            # The engine makes at least one token; nobody asked for it.
            return before
        if self._logprobs is not None:
            self._logprobs.add(chunk)
        return before + chunk.text

    def logprobs(self) -> dict[str, Any] | None:
        """Those of what was taken since the last time."""
        return None if self._logprobs is None else self._logprobs.take()


async def _answers(job: Job, body: CompletionBody) -> list[_Answer]:
    vocabulary = Vocabulary(job.model.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
    return [
        _Answer(vocabulary, body, ids, text)
        for ids, text in zip(job.prompts, await _echoes(job, body), strict=True)
        for _ in range(job.n)
    ]


async def _echoes(job: Job, body: CompletionBody) -> Sequence[str | None]:
    """The text of each prompt, None where it is not to be said again."""
    if not body.echo:
        return [None] * len(job.prompts)
    texts = [prompt for prompt in given_prompts(body) if isinstance(prompt, str)]
    return texts or await texts_of(job.model, job.prompts)


async def _ids(model: ServedModel, body: CompletionBody) -> list[list[int]]:
    prompts = given_prompts(body)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        return await given_ids(model, [ids for ids in prompts if not isinstance(ids, str)], "prompt")
    special = True if body.add_special_tokens is None else body.add_special_tokens
    return await text_ids(model, texts, add_special_tokens=special)


def _usage(tally: Tally, body: CompletionBody) -> dict[str, Any]:
    usage = tally.usage()
    if body.max_tokens == 0:
        usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
    return usage
