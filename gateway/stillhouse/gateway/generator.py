"""What the gateway speaks to: models that are live, and something that answers for them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from stillhouse.engine.answer import Chunk
from stillhouse.engine.directory import VersionDirectory
from stillhouse.engine.generation import default_params, generation_config
from stillhouse.engine.sampling import SamplingParams
from stillhouse.engine.scheduler import Limits
from stillhouse.engine.text import Tokenizer
from stillhouse.engine.thinking import ThinkingTags, thinking_tags


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A live version of a model, as far as the gateway has to know it; `max_model_len` in tokens, prompt and answer."""

    name: str
    version: int
    created_s: int  # since the epoch
    max_model_len: int
    slots: int  # answers that are generated at the same time, as far as the KV cache holds them
    kv_capacity_tokens: int
    max_prompt_bytes: int  # of UTF-8: more text than this is surely more than the context
    vocab_size: int
    tokenizer: Tokenizer
    default_params: SamplingParams
    thinking_tags: ThinkingTags | None

    def answers_together(self, num_prompt_tokens: int, max_tokens: int) -> int:
        """How many answers of `max_tokens` to the longest prompt run together, whatever comes of them."""
        longest = min(num_prompt_tokens + max_tokens, self.max_model_len)
        return max(1, min(self.slots, self.kv_capacity_tokens // longest))


@dataclass(frozen=True, slots=True)
class Figure:
    """A gauge or a counter (its name ends with _total) of one model, for the metrics page."""

    name: str
    description: str
    model: str
    version: int
    value: float


class Generator(Protocol):
    """Answers prompts with live models. All of it is called on the gateway's event loop."""

    def models(self) -> Sequence[ServedModel]:
        """The models that may be asked, each with the version that is live now."""
        ...

    def missing(self) -> Mapping[str, str]:
        """The models that are served here, but cannot be asked now: name → why."""
        ...

    def stream(
        self, model: ServedModel, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[Chunk, None]:
        """One answer (`params.n` is 1) as it comes; closing the generator cancels it.

        Raises StillhouseError: InvalidRequest, QueueFull, EngineClosed, Unavailable, …; a chunk never carries one.
        """
        ...

    def fault(self) -> str | None:
        """Why requests cannot be answered now; None where they can."""
        ...

    def figures(self) -> Iterable[Figure]:
        """The engine's own figures, where nobody else publishes them."""
        ...

    async def close(self) -> None:
        """Lets go of everything; what still runs ends with Unavailable."""
        ...


def describe(
    version: VersionDirectory, tokenizer: Tokenizer, limits: Limits, *, name: str | None = None
) -> ServedModel:
    """What the version directory says of itself, and its engine; `name` is what it is asked as, where that is another.

    Raises VersionError where its texts are broken.
    """
    manifest = version.manifest
    return ServedModel(
        name=name or manifest.model,
        version=manifest.version,
        created_s=int(manifest.created.timestamp()),
        max_model_len=limits.max_model_len,
        slots=limits.slots,
        kv_capacity_tokens=limits.kv_capacity_tokens,
        max_prompt_bytes=limits.max_model_len * tokenizer.longest_token_bytes,
        vocab_size=manifest.network.vocab_size,
        tokenizer=tokenizer,
        default_params=default_params(generation_config(version.path)),
        thinking_tags=thinking_tags(tokenizer),
    )
