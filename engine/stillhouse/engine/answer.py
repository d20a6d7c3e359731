"""What a caller gets: chunks of text as they come, or the whole answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.request import FinishReason, PromptLogprob, Token
from stillhouse.engine.sampling import SamplingParams
from stillhouse.engine.text import Detokenizer, StopMatcher, Tokenizer
from stillhouse.engine.thinking import Thinking


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step adds to an answer. Exactly one chunk of an answer has a finish reason: its last.

    `text` is the new text ("" while half a character or the beginning of a stop string is held back); `logprob` and
    what follows from it are None unless `params.logprobs` asks for them, `prompt_logprobs` (on the first chunk) unless
    `params.prompt_logprobs` does. `index` tells the answers of `params.n` apart. Of `num_output_tokens`,
    `num_thinking_tokens` were between <think> and </think>.
    """

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: FinishReason | None = None
    error: StillhouseError | None = None
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    rank: int | None = None
    cumulative_logprob: float | None = None
    prompt_logprobs: list[PromptLogprob] | None = None
    num_thinking_tokens: int = 0
    index: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    cumulative_logprob: float | None = None
    prompt_logprobs: list[PromptLogprob] | None = None
    num_thinking_tokens: int = 0


def completion_of(chunks: list[Chunk]) -> Completion:
    """The whole answer that `chunks`, of one index, are the pieces of."""
    last = chunks[-1]
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        finish_reason=last.finish_reason or "stop",
        num_prompt_tokens=last.num_prompt_tokens,
        num_output_tokens=last.num_output_tokens,
        cumulative_logprob=last.cumulative_logprob,
        prompt_logprobs=chunks[0].prompt_logprobs,
        num_thinking_tokens=last.num_thinking_tokens,
    )


class TextSink:
    """Turns an engine's tokens into chunks of text; tells the engine when a stop string has come."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        num_prompt_tokens: int,
        thinking: Thinking | None,
        index: int,
        sink: Callable[[Chunk], None],
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stop = StopMatcher(params.stop, include=params.include_stop_str_in_output)
        self._include_end = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_prompt_tokens = num_prompt_tokens
        self._num_output_tokens = 0
        self._cumulative_logprob = None if params.logprobs is None else 0.0
        self._thinking = thinking
        self._hidden_tags = thinking.tags.hidden(skip_special_tokens=params.skip_special_tokens) if thinking else {}
        self._index = index
        self._sink = sink

    def __call__(self, token: Token) -> bool:
        text, stopped = "", False
        if token.token_id is not None:
            self._num_output_tokens += 1
            if token.logprob is not None:
                self._cumulative_logprob = (self._cumulative_logprob or 0.0) + token.logprob
            if token.token_id in self._hidden_tags:
                # The tag leaves no trace in the text: what was before it must not come out behind it.
                text, stopped = self._flush()
            # What only ends an answer is no part of it, unless it is asked for like a stop string.
            elif not token.is_end or self._include_end:
                text, stopped = self._match(self._detokenizer.push(token.token_id))
        # After an error what is held back may be what failed: it stays where it is.
        if token.finish_reason and not stopped and token.error is None:
            tail, stopped = self._flush()
            text += tail
        self._sink(
            Chunk(
                text=text,
                token_ids=() if token.token_id is None else (token.token_id,),
                num_prompt_tokens=self._num_prompt_tokens,
                num_output_tokens=self._num_output_tokens,
                finish_reason="stop" if stopped else token.finish_reason,
                error=token.error,
                logprob=token.logprob,
                top_logprobs=token.top_logprobs,
                rank=token.rank,
                cumulative_logprob=self._cumulative_logprob,
                prompt_logprobs=token.prompt_logprobs,
                num_thinking_tokens=self._thinking.tokens if self._thinking else 0,
                index=self._index,
            )
        )
        return stopped

    def _flush(self) -> tuple[str, bool]:
        """What was held back, as it is."""
        tail, stopped = self._match(self._detokenizer.flush())
        return tail if stopped else tail + self._stop.flush(), stopped

    def _match(self, piece: str) -> tuple[str, bool]:
        """Looks for stop strings behind the first `min_tokens` tokens, as vLLM does."""
        return (piece, False) if self._num_output_tokens <= self._min_tokens else self._stop.push(piece)
