"""Chooses the next token of each row from its logits; numpy only.

The order of the steps is vLLM's: bias, penalties, temperature, min-p, top-k, top-p. Log-probabilities are those of the
model itself, before any of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillhouse.engine.errors import EngineError, InvalidRequest, StillhouseError
from stillhouse.engine.request import PromptLogprob, Request
from stillhouse.engine.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Choice:
    """A sampled token; `token_id` is None where there can be none, and `error` says why."""

    token_id: int | None
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    rank: int | None = None
    error: StillhouseError | None = None


def choose(logits: NDArray[np.float32], requests: Sequence[Request], eos_ids: frozenset[int]) -> list[Choice]:
    """One choice a row of `logits` (rows, vocab_size); a row's choice depends on its own request alone."""
    best = logits.argmax(axis=1)
    choices = []
    for row, request in enumerate(requests):
        # argmax finds a NaN before any number, so the winner alone tells whether the row is sound.
        if not np.isfinite(logits[row, best[row]]):
            choices.append(Choice(None, error=_NOT_FINITE))
        elif _is_plain(request):
            choices.append(Choice(int(best[row])))
        else:
            choices.append(_choose_one(logits[row], request, eos_ids))
    return choices


_NOT_FINITE = EngineError("the model's logits are not finite (NaN or inf)", hint="check the version's quality")


def _is_plain(request: Request) -> bool:
    """Whether the most likely token is the answer as it stands."""
    params = request.params
    return (
        params.greedy
        and params.logprobs is None
        and not params.logit_bias
        and params.repetition_penalty == 1.0
        and params.presence_penalty == 0.0
        and params.frequency_penalty == 0.0
        and len(request.output_ids) >= params.min_tokens
        and (request.thinking is None or request.thinking.forced_token() is None)
        and request.constraint is None
    )


def _choose_one(row: NDArray[np.float32], request: Request, eos_ids: frozenset[int]) -> Choice:
    params = request.params
    token = request.thinking.forced_token() if request.thinking else None
    if token is None:
        scores = row.astype(np.float32, copy=True)  # (vocab_size,)
        if params.logit_bias:
            scores[list(params.logit_bias)] += np.asarray(list(params.logit_bias.values()), np.float32)
        _penalize(scores, request)
        try:
            _forbid(scores, request, eos_ids)
        except EngineError as error:
            return Choice(None, error=error)
        except Exception as error:  # a form's fault is its request's alone
            return Choice(None, error=EngineError(f"the answer's form cannot be followed: {error}"))
        token = int(scores.argmax()) if params.greedy else _draw(scores, params, _generator(request))
    if params.logprobs is None:
        return Choice(token)
    logprob, top = _logprobs(row, token, params.logprobs)
    return Choice(token, logprob, top, _rank(row, token))


def _penalize(scores: NDArray[np.float32], request: Request) -> None:
    """Repetition penalty over prompt and output (Keskar et al., 2019); presence and frequency over the output."""
    params = request.params
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(request.prompt_ids + request.output_ids, np.int64))
        values = scores[seen]
        scores[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and request.output_ids:
        tokens, counts = np.unique(np.asarray(request.output_ids, np.int64), return_counts=True)
        scores[tokens] -= params.presence_penalty + params.frequency_penalty * counts.astype(np.float32)


def _forbid(scores: NDArray[np.float32], request: Request, eos_ids: frozenset[int]) -> None:
    """Rules out what would end the answer before `min_tokens`, and what its constraint does not allow."""
    if len(request.output_ids) < request.params.min_tokens:
        scores[list(eos_ids | frozenset(request.params.stop_token_ids))] = -np.inf
    if (allowed := request.allowed()) is not None:
        scores[~allowed] = -np.inf
    if not np.isfinite(scores.max()):
        raise InvalidRequest("no token may come next: min_tokens, logit_bias and the constraint rule each other out")


def _draw(scores: NDArray[np.float32], params: SamplingParams, generator: np.random.Generator) -> int:
    """A token id from softmax(scores / temperature) cut by min-p, top-k and top-p, with one uniform number."""
    # Relative to the largest: division by a tiny temperature must not overflow to inf − inf.
    weights = np.exp((scores - scores.max()) / np.float32(params.temperature))
    ids = np.flatnonzero(weights > 0 if params.min_p == 0.0 else weights >= params.min_p)
    if 0 < params.top_k < ids.size:
        ids = ids[np.argpartition(weights[ids], -params.top_k)[-params.top_k :]]
    if params.top_p < 1.0:
        ids = _nucleus(weights, ids, params.top_p)
    mass = np.cumsum(weights[ids], dtype=np.float64)
    drawn = int(np.searchsorted(mass, generator.random() * mass[-1], side="right"))
    return int(ids[min(drawn, ids.size - 1)])


def _nucleus(weights: NDArray[np.float32], ids: NDArray[np.intp], top_p: float) -> NDArray[np.intp]:
    """The smallest set of `ids` whose share of the mass reaches `top_p` (Holtzman et al., 2020); never empty."""
    target = top_p * float(weights[ids].sum(dtype=np.float64))
    # Sorting a whole vocabulary costs milliseconds. The heaviest tokens, down to a floor, nearly always suffice.
    for floor in (1e-2, 1e-4, 0.0):
        head = ids[weights[ids] >= floor * float(weights[ids].max())]
        if float(weights[head].sum(dtype=np.float64)) >= target:
            break
    order = head[np.argsort(-weights[head], kind="stable")]
    return order[: int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), target)) + 1]


def _generator(request: Request) -> np.random.Generator:
    """The request's own random numbers: what else runs cannot change them."""
    if request.generator is None:
        seed = request.params.seed
        request.generator = np.random.default_rng(None if seed is None else seed % 2**64)
    return request.generator


def logprobs_of(logits: NDArray[np.float32], tokens: Sequence[int], count: int) -> list[PromptLogprob]:
    """The log-probability of `tokens[i]` by `logits[i]` (rows, vocab_size), with the `count` likeliest beside it."""
    rows = zip(logits, tokens, strict=True)
    return [PromptLogprob(token, *_logprobs(row, token, count), rank=_rank(row, token)) for row, token in rows]


def _rank(row: NDArray[np.float32], token: int) -> int:
    return 1 + int(np.count_nonzero(row > row[token]))


def _logprobs(row: NDArray[np.float32], token: int, count: int) -> tuple[float, dict[int, float]]:
    """In float32, as the logits are: in float64 a vocabulary's exponentials take a millisecond."""
    largest = row.max()
    normalizer = float(largest) + math.log(float(np.exp(row - largest).sum()))
    count = min(count, row.size - 1)
    top = np.argpartition(row, -count)[-count:] if count else np.empty(0, np.int64)
    top = top[np.argsort(-row[top], kind="stable")]
    return float(row[token]) - normalizer, {int(t): float(row[t]) - normalizer for t in top}
