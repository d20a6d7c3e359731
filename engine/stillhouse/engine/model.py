"""A version directory, ready to answer: tokenizer, engine and runner put together behind the text door."""

from __future__ import annotations

import json
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from stillhouse.engine.core import Engine, Limits, Stats
from stillhouse.engine.directory import VersionDirectory, open_version
from stillhouse.engine.errors import InvalidRequest, StillhouseError, UsageError, VersionError
from stillhouse.engine.options import EngineOptions, read_options
from stillhouse.engine.request import FinishReason, Request, Token
from stillhouse.engine.sampling import SamplingParams, parse_params
from stillhouse.engine.text import Detokenizer, Message, StopMatcher, Tokenizer

# What is served when nothing else is said: room for a conversation, within a tenth of the machine's memory.
DEFAULT_MODEL_LEN_TOKENS = 4096
LEAST_MODEL_LEN_TOKENS = 2048
KV_SHARE_OF_MEMORY = 0.1


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step adds to an answer. Exactly one chunk has a finish reason: the last.

    `text` is the new text ("" while half a character or the beginning of a stop string is held back); `logprob` and
    what follows from it are None unless `params.logprobs` asks for them.
    """

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: FinishReason | None = None
    error: StillhouseError | None = None
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    cumulative_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    cumulative_logprob: float | None = None


class LanguageModel:
    """Answers prompts with the model in a version directory; a context manager."""

    def __init__(
        self, version: VersionDirectory, tokenizer: Tokenizer, engine: Engine, default_params: SamplingParams
    ) -> None:
        self.version = version
        self.tokenizer = tokenizer
        self.engine = engine
        self.default_params = default_params

    @classmethod
    def load(cls, directory: Path, options: EngineOptions | None = None, *, verify: bool = True) -> LanguageModel:
        """Opens the version at `directory` (its files re-hashed unless `verify` is off) and starts its engine.

        `options` default to engine.json beside the version. Raises VersionError or TamperedError for a directory
        that is not whole, UsageError for limits that do not go together, EngineError when the graph does not load.
        """
        from stillhouse.engine.runner import OrtRunner  # ONNX Runtime is loaded when a model is, not before

        version = open_version(directory, verify=verify)
        options = options or read_options(directory.resolve().parent)
        limits = _limits(version, options)
        tokenizer = Tokenizer(directory)
        generation = _generation_config(directory)
        runner = OrtRunner(
            version.model_path,
            network=version.manifest.network,
            slots=limits.slots,
            max_len=limits.max_model_len,
            threads=options.threads,
        )
        engine = Engine(runner, limits, _eos_ids(version, generation))
        engine.start()
        return cls(version, tokenizer, engine, _default_params(generation))

    @property
    def max_model_len(self) -> int:
        return self.engine.limits.max_model_len

    @property
    def healthy(self) -> bool:
        return self.engine.healthy

    def prompt_ids(
        self,
        *,
        text: str | None = None,
        messages: Sequence[Message] | None = None,
        input_ids: Sequence[int] | None = None,
    ) -> list[int]:
        """Token ids of exactly one of: plain text, chat messages, ids. Raises InvalidRequest otherwise."""
        if sum(given is not None for given in (text, messages, input_ids)) != 1:
            raise InvalidRequest("give exactly one of text, messages and input_ids")
        if text is not None:
            ids = self.tokenizer.encode(text)
        elif messages is not None:
            ids = self.tokenizer.encode_chat(messages)
        else:
            ids = [int(token) for token in input_ids or ()]
        if not ids:
            raise InvalidRequest("the prompt is empty", hint="give some text")
        vocab_size = self.version.manifest.network.vocab_size
        if wrong := [token for token in ids if not 0 <= token < vocab_size]:
            raise InvalidRequest(f"token id {wrong[0]} is not in the vocabulary of {vocab_size} tokens")
        return ids

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, sink: Callable[[Chunk], None]) -> Request:
        """Queues a request and returns at once; `sink` gets every chunk from the engine's thread, and must be quick."""
        self._check_token_ids(params)
        return self.engine.submit(prompt_ids, params, _TextSink(self.tokenizer, params, len(prompt_ids), sink))

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Chunk]:
        """The answer's chunks as they come; closing the iterator cancels the request.

        The request is queued at the call, not at the first `next`. Raises the chunk's error where it has one.
        """
        chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        request = self.submit(prompt_ids, params, chunks.put)
        return _until_finished(chunks, request)

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """The whole answer."""
        chunks = list(self.stream(prompt_ids, params))
        last = chunks[-1]
        return Completion(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            finish_reason=last.finish_reason or "stop",
            num_prompt_tokens=last.num_prompt_tokens,
            num_output_tokens=last.num_output_tokens,
            cumulative_logprob=last.cumulative_logprob,
        )

    def stats(self) -> Stats:
        return self.engine.stats()

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends the engine; what was under way ends as cancelled."""
        self.engine.close(timeout_s)

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_token_ids(self, params: SamplingParams) -> None:
        vocab_size = self.version.manifest.network.vocab_size
        for name in ("logit_bias", "stop_token_ids"):
            if wrong := [token for token in getattr(params, name) if not 0 <= token < vocab_size]:
                raise InvalidRequest(f"{name}: token id {wrong[0]} is not in the vocabulary of {vocab_size} tokens")


class _TextSink:
    """Turns an engine's tokens into chunks of text; tells the engine when a stop string has come."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        num_prompt_tokens: int,
        sink: Callable[[Chunk], None],
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stop = StopMatcher(params.stop, include=params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._num_prompt_tokens = num_prompt_tokens
        self._num_output_tokens = 0
        self._cumulative_logprob = None if params.logprobs is None else 0.0
        self._sink = sink

    def __call__(self, token: Token) -> bool:
        text, stopped = "", False
        if token.token_id is not None:
            self._num_output_tokens += 1
            if token.logprob is not None:
                self._cumulative_logprob = (self._cumulative_logprob or 0.0) + token.logprob
            text, stopped = self._stop.push(self._detokenizer.push(token.token_id))
        if token.finish_reason and not stopped:
            tail, stopped = self._stop.push(self._detokenizer.flush())
            text += tail if stopped else tail + self._stop.flush()
        reason: FinishReason | None = "stop" if stopped else token.finish_reason
        self._sink(
            Chunk(
                text=text,
                token_ids=() if token.token_id is None else (token.token_id,),
                num_prompt_tokens=self._num_prompt_tokens,
                num_output_tokens=self._num_output_tokens,
                finish_reason=reason,
                error=token.error,
                logprob=token.logprob,
                top_logprobs=token.top_logprobs,
                cumulative_logprob=self._cumulative_logprob,
            )
        )
        return stopped


def _until_finished(chunks: queue.SimpleQueue[Chunk], request: Request) -> Iterator[Chunk]:
    finished = False
    try:
        while not finished:
            chunk = chunks.get()
            finished = chunk.finish_reason is not None
            if chunk.error is not None:
                raise chunk.error
            yield chunk
    finally:
        if not finished:
            request.cancel()


def _limits(version: VersionDirectory, options: EngineOptions) -> Limits:
    """Sizes from the options, the model and the machine's memory; the context served fits the KV budget."""
    network, per_token = version.manifest.network, version.manifest.memory.kv_bytes_per_token
    wanted = options.max_model_len or min(DEFAULT_MODEL_LEN_TOKENS, network.context_length)
    if wanted > network.context_length:
        raise UsageError(
            f"max_model_len is {wanted}, but {version.manifest.model} was made for {network.context_length} tokens",
            hint=f"ask for at most {network.context_length}",
        )
    budget_bytes = options.kv_cache_bytes or int(_memory_bytes() * KV_SHARE_OF_MEMORY)
    capacity = budget_bytes // per_token
    if options.max_model_len is None:
        wanted = min(wanted, max(capacity, min(LEAST_MODEL_LEN_TOKENS, network.context_length)))
    if options.kv_cache_bytes is None:
        capacity = max(capacity, wanted)
    if capacity < wanted:
        raise UsageError(
            f"kv_cache_bytes {budget_bytes} holds {capacity} tokens, max_model_len is {wanted}",
            hint=f"give at least {wanted * per_token} bytes, or ask for a smaller max_model_len",
        )
    return Limits(
        slots=options.max_num_seqs,
        max_model_len=wanted,
        kv_capacity_tokens=min(capacity, options.max_num_seqs * wanted),
        prefill_chunk_tokens=options.prefill_chunk_tokens,
        max_waiting=options.max_waiting,
    )


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _generation_config(directory: Path) -> dict[str, Any]:
    file = directory / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise VersionError(f"{file} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _eos_ids(version: VersionDirectory, generation: dict[str, Any]) -> list[int]:
    """Every token that ends an answer: the manifest's and generation_config.json's."""
    named = generation.get("eos_token_id") or []
    return sorted({*version.manifest.network.eos_token_ids, *([named] if isinstance(named, int) else named)})


def _default_params(generation: dict[str, Any]) -> SamplingParams:
    """Sampling defaults that the model's authors put into generation_config.json; greedy where they say so."""
    if generation.get("do_sample") is False:
        return SamplingParams(temperature=0.0)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return parse_params({name: generation[name] for name in names if generation.get(name) is not None})
