"""A version directory, ready to answer: tokenizer, engine and runner put together behind the text door."""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from stillhouse.engine.answer import Chunk, Completion, TextSink, completion_of
from stillhouse.engine.core import Engine, Stats
from stillhouse.engine.directory import VersionDirectory, open_version
from stillhouse.engine.errors import InvalidRequest, PromptTooLong
from stillhouse.engine.generation import default_params, generation_config
from stillhouse.engine.grammar import GrammarCompiler, GrammarConstraint
from stillhouse.engine.limits import limits_of
from stillhouse.engine.options import EngineOptions, read_options
from stillhouse.engine.request import Request, Timing
from stillhouse.engine.sampling import SamplingParams
from stillhouse.engine.text import Message, Tokenizer
from stillhouse.engine.thinking import Thinking, thinking_tags


@dataclass(frozen=True, slots=True)
class Submitted:
    """A handle on what was asked: one request, or the `n` of `params.n`."""

    requests: tuple[Request, ...]

    def cancel(self) -> None:
        """Ends every answer that still runs; a last chunk of each says "cancelled"."""
        for request in self.requests:
            request.cancel()

    @property
    def id(self) -> str:
        return self.requests[0].id

    @property
    def timing(self) -> Timing:
        """The moments of the first answer."""
        return self.requests[0].timing

    @property
    def num_prompt_tokens(self) -> int:
        return self.requests[0].num_prompt_tokens


class LanguageModel:
    """Answers prompts with the model in a version directory; a context manager."""

    def __init__(
        self,
        version: VersionDirectory,
        tokenizer: Tokenizer,
        engine: Engine,
        default_params: SamplingParams,
        provider: str,
        threads: int | None,
    ) -> None:
        self.version = version
        self.tokenizer = tokenizer
        self.engine = engine
        self.default_params = default_params
        self.provider = provider  # ONNX Runtime's name of the one that runs it
        self.threads = threads  # None: one a core
        self.thinking_tags = thinking_tags(tokenizer)
        self._grammars: GrammarCompiler | None = None

    @classmethod
    def load(cls, directory: Path, options: EngineOptions | None = None, *, verify: bool = True) -> LanguageModel:
        """Opens the version at `directory` (its files re-hashed unless `verify` is off) and starts its engine.

        `options` default to engine.json beside the version. Raises VersionError or TamperedError for a directory
        that is not whole, UsageError for limits that do not go together, EngineError when the graph does not load.
        """
        # ONNX Runtime is loaded when a model is, not before.
        from stillhouse.engine.runner import OrtRunner
        from stillhouse.engine.session import choose_provider, model_to_load

        version = open_version(directory, verify=verify)
        options = options or read_options(directory.resolve().parent)
        provider = choose_provider(options.provider, version.manifest.target)
        limits = limits_of(version.manifest, options, allocated_whole=provider != "cpu")
        tokenizer = Tokenizer(directory)
        generation = generation_config(directory)
        runner = OrtRunner(
            model_to_load(version, provider) if options.weights_cache else version.model_path,
            network=version.manifest.network,
            slots=limits.slots + limits.prefix_slots,
            max_len=limits.max_model_len,
            threads=options.threads,
            provider=provider,
        )
        engine = Engine(runner, limits, _eos_ids(version, generation))
        engine.start()
        return cls(version, tokenizer, engine, default_params(generation), runner.provider, runner.threads)

    @property
    def max_model_len(self) -> int:
        return self.engine.limits.max_model_len

    @property
    def healthy(self) -> bool:
        return self.engine.healthy

    @property
    def failed(self) -> bool:
        return self.engine.failed

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
            self._check_size(text)
            ids = self.tokenizer.encode(text)
        elif messages is not None:
            self._check_size(text := self.tokenizer.render_chat(messages))
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = [int(token) for token in input_ids or ()]
        if not ids:
            raise InvalidRequest("the prompt is empty", hint="give some text")
        self._check_token_ids("input_ids", ids)
        return ids

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        sink: Callable[[Chunk], None],
        *,
        timeout_s: float | None = None,
        came_s: float | None = None,
    ) -> Submitted:
        """Queues a request and returns at once; `sink` gets every chunk from the engine's thread, and must be quick.

        `timeout_s` counts from `came_s`, on the clock of time.perf_counter; None is now. With `params.n` above 1 the
        chunks of the answers come mixed, told apart by their index. Raises InvalidRequest (PromptTooLong among them),
        QueueFull or EngineClosed.
        """
        if params.n > (most := self.engine.limits.most_alike(len(prompt_ids))):
            raise InvalidRequest(
                f"n: {params.n} answers to a prompt of {len(prompt_ids)} tokens are more than run and wait here"
                f" together, {most}"
            )
        self._check_token_ids("logit_bias", params.logit_bias)
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        wanted = params.structured_outputs
        form = self._grammar_compiler().compile(wanted) if wanted else None
        requests: list[Request] = []
        try:
            requests.extend(
                self._submit_one(prompt_ids, params, sink, index, timeout_s, came_s, form) for index in range(params.n)
            )
        except Exception:
            # All of them or none: what is queued already must not answer alone.
            Submitted(tuple(requests)).cancel()
            raise
        return Submitted(tuple(requests))

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, timeout_s: float | None = None
    ) -> Generator[Chunk, None, None]:
        """The answer's chunks as they come; closing the iterator cancels the request.

        The request is queued at the call, not at the first `next`. Raises the chunk's error where it has one.
        """
        chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        submitted = self.submit(prompt_ids, params, chunks.put, timeout_s=timeout_s)
        answer = _until_finished(chunks, submitted)
        # A generator that was never begun has no `finally` to run at its close: begin it here.
        next(answer)
        return answer

    def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, timeout_s: float | None = None
    ) -> Completion:
        """The whole answer; of `params.n` there must be one (see `generate_all`)."""
        if params.n != 1:
            raise InvalidRequest(f"one answer is asked for here, n is {params.n}", hint="call generate_all")
        return self.generate_all(prompt_ids, params, timeout_s=timeout_s)[0]

    def generate_all(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, timeout_s: float | None = None
    ) -> list[Completion]:
        """The `params.n` answers, whole."""
        chunks: list[list[Chunk]] = [[] for _ in range(params.n)]
        for chunk in self.stream(prompt_ids, params, timeout_s=timeout_s):
            chunks[chunk.index].append(chunk)
        return [completion_of(pieces) for pieces in chunks]

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

    def _submit_one(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        sink: Callable[[Chunk], None],
        index: int,
        timeout_s: float | None,
        came_s: float | None,
        form: GrammarConstraint | None,
    ) -> Request:
        if index and params.seed is not None:
            params = replace(params, seed=(params.seed + index) % 2**64)
        thinking = None
        if self.thinking_tags is not None:
            thinking = Thinking(self.thinking_tags, prompt_ids, params.thinking_token_budget)
        elif params.thinking_token_budget is not None:
            raise InvalidRequest(
                f"thinking_token_budget: {self.version.manifest.model} does not think: it knows no <think> tag",
                hint="leave thinking_token_budget out",
            )
        return self.engine.submit(
            prompt_ids,
            params,
            TextSink(self.tokenizer, params, len(prompt_ids), thinking, index, sink),
            timeout_s=timeout_s,
            came_s=came_s,
            thinking=thinking,
            constraint=form.copy() if form else None,
        )

    def _grammar_compiler(self) -> GrammarCompiler:
        if self._grammars is None:
            network = self.version.manifest.network
            self._grammars = GrammarCompiler.load(self.version.path, network.vocab_size, network.eos_token_ids)
        return self._grammars

    def _check_size(self, text: str) -> None:
        """Refuses a text that cannot fit the context before it is read: of megabytes that would take seconds."""
        most = self.max_model_len * self.tokenizer.longest_token_bytes
        if len(text) > most:
            raise PromptTooLong(
                f"the prompt has {len(text)} characters, the context holds {self.max_model_len} tokens,"
                f" {most} bytes of text at most",
                hint="shorten the prompt, or serve with a larger --max-model-len",
            )

    def _check_token_ids(self, name: str, ids: Any) -> None:
        vocab_size = self.version.manifest.network.vocab_size
        if wrong := [token for token in ids if not 0 <= token < vocab_size]:
            raise InvalidRequest(f"{name}: token id {wrong[0]} is not in the vocabulary of {vocab_size} tokens")


def _until_finished(chunks: queue.SimpleQueue[Chunk], submitted: Submitted) -> Generator[Chunk, None, None]:
    """Yields one chunk of nothing when begun, then the answer's."""
    running = len(submitted.requests)
    try:
        yield Chunk("", (), submitted.num_prompt_tokens, 0)
        while running:
            chunk = chunks.get()
            running -= chunk.finish_reason is not None
            if chunk.error is not None:
                raise chunk.error
            yield chunk
    finally:
        if running:
            submitted.cancel()


def _eos_ids(version: VersionDirectory, generation: dict[str, Any]) -> list[int]:
    """Every token that ends an answer: the manifest's and generation_config.json's."""
    named = generation.get("eos_token_id") or []
    return sorted({*version.manifest.network.eos_token_ids, *([named] if isinstance(named, int) else named)})
