"""From the engine's chunks to output tensors: one response a chunk, or one for all of them.

Of a request for several answers (`n`) each response has an element for each, as in Triton's vLLM backend.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.serve.tensors import Question, strings

if TYPE_CHECKING:
    from stillhouse.engine.answer import Chunk

Tensors = dict[str, "NDArray[Any]"]


def answer_tensors(
    question: Question,
    parts: Sequence[Sequence[Chunk]],
    lasts: Sequence[Chunk | None],
    prompt: str,
    token_text: Callable[[int], str],
) -> Tensors:
    """The outputs that `question` asks for, over the chunks of each answer in this response, not all of them empty.

    As in Triton's vLLM backend: text, logprobs and num_output_tokens are of these chunks alone, the cumulative
    log-probability and finish_reason ("None" before the end) are the answer's so far: `lasts` has the last chunk of
    each by now (None: it has not begun). `prompt` goes before each text.
    """
    texts = (prompt + "".join(chunk.text for chunk in part) for part in parts)
    tensors: Tensors = {"text_output": strings(*texts)}
    if "finish_reason" in question.returns:
        tensors["finish_reason"] = strings(*(str(last.finish_reason if last else None) for last in lasts))
    if "cumulative_logprob" in question.returns:
        sums = [last.cumulative_logprob if last else 0.0 for last in lasts]
        tensors["cumulative_logprob"] = np.array(sums, np.float32)
    if "logprobs" in question.returns:
        asked = question.logprobs_asked
        tensors["logprobs"] = strings(*(_logprobs_json(part, token_text) if asked else "null" for part in parts))
    if "num_input_tokens" in question.returns:
        (count, *_) = (last.num_prompt_tokens for last in lasts if last)
        tensors["num_input_tokens"] = np.array([count], np.uint32)
    if "num_output_tokens" in question.returns:
        counts = [sum(len(chunk.token_ids) for chunk in part) for part in parts]
        tensors["num_output_tokens"] = np.array(counts, np.uint32)
    if "details" in question.returns:
        tensors["details"] = strings(*(_details_json(part) if part else "null" for part in parts))
    return tensors


def _details_json(chunks: Sequence[Chunk]) -> str:
    """The tokens one by one and the counts so far; what has not been asked for by the parameters is left out.

    {"token_ids": [5], "num_input_tokens": 9, "num_output_tokens": 3, "num_thinking_tokens": 0, "finish_reason": null,
     "logprobs": [[logprob, rank, [[token id, logprob], …]]], "prompt_logprobs": [[token id, logprob, [[…]], rank], …]}
    """
    last = chunks[-1]
    details: dict[str, Any] = {
        "token_ids": [token_id for chunk in chunks for token_id in chunk.token_ids],
        "num_input_tokens": last.num_prompt_tokens,
        "num_output_tokens": last.num_output_tokens,
        "num_thinking_tokens": last.num_thinking_tokens,
        "finish_reason": last.finish_reason,
    }
    with_logprobs = [chunk for chunk in chunks if chunk.logprob is not None]
    if with_logprobs:
        details["logprobs"] = [
            [chunk.logprob, chunk.rank, list((chunk.top_logprobs or {}).items())] for chunk in with_logprobs
        ]
    if chunks[0].prompt_logprobs is not None:
        details["prompt_logprobs"] = [
            [found.token_id, found.logprob, list(found.top_logprobs.items()), found.rank]
            for found in chunks[0].prompt_logprobs
        ]
    return json.dumps(details, separators=(",", ":"))


def _logprobs_json(chunks: Sequence[Chunk], token_text: Callable[[int], str]) -> str:
    """A JSON list with one object a token: token id → logprob, rank (1: the most likely) and decoded_token."""
    positions = []
    for chunk in chunks:
        for token_id in chunk.token_ids:
            ranked: dict[int, tuple[float, int]] = {}
            for rank, (other, logprob) in enumerate((chunk.top_logprobs or {}).items(), start=1):
                ranked[other] = (logprob, rank)
            if token_id not in ranked and chunk.logprob is not None:
                ranked[token_id] = (chunk.logprob, chunk.rank or len(ranked) + 1)
            positions.append(
                {
                    str(other): {"logprob": logprob, "rank": rank, "decoded_token": token_text(other)}
                    for other, (logprob, rank) in ranked.items()
                }
            )
    return json.dumps(positions)
