"""How the benchmark speaks to a peer: one JSON object a line on stdin, one answer a line on stdout.

    {"op": "load", "model": PATH, "threads": 2, "sequences": 32, "context_tokens": 2048}
        -> {"settings": {NAME: VALUE}, "model_bytes": N, "load_s": S}
    {"op": "decode", "prompts": [[ID, …], …], "tokens": 64}  -> {"tokens_per_s": X}
    {"op": "prefill", "prompt": [ID, …]}                     -> {"tokens_per_s": X}
    {"op": "ttft", "prompts": [[ID, …], …]}                  -> {"ttft_s": [S, …]}
    {"op": "memory"}                                         -> {"peak_rss_bytes": N, "anonymous_bytes": N}
    {"op": "perplexity", "windows": [[ID, …], …]}            -> {"nll": X, "tokens": N}, or {"unsupported": WHY}

An error is {"error": MESSAGE}. What a runtime itself prints to stdout goes to stderr. This module runs in every
peer's environment, so it imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

TTFT_TOKENS = 8  # what a request of `ttft` goes on to generate, so that it is one of a server's and not a lone prefill


class Peer(Protocol):
    """One runtime. All generation is greedy, to the length asked for, whatever the model says about an end."""

    def load(self, model: Path, *, threads: int, sequences: int, context_tokens: int) -> dict[str, Any]:
        """Opens the model; {"settings": …, "model_bytes": …}. Imports belong before the clock: see `imports`."""
        ...

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        """Tokens/s over all sequences while every one of them decodes: prefill and the ragged end left out."""
        ...

    def prefill(self, prompt: list[int]) -> float:
        """Tokens/s of one prompt, from its submission to its first token."""
        ...

    def ttft(self, prompts: list[list[int]]) -> list[float]:
        """Seconds from the submission of all `prompts` at once to the first token of each."""
        ...

    def perplexity(self, windows: list[list[int]]) -> tuple[float, int]:
        """Sum of the negative log-likelihoods (nats) of each window's tokens but its first, and their number."""
        ...


def serve(peer: Peer, imports: Sequence[str] = ()) -> None:
    """Answers requests until stdin ends. `imports` are imported first, so that `load` times the model alone."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for name in imports:
        __import__(name)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _answer(peer, request)
        except Exception as error:  # the boundary: the benchmark reports the error of a peer and goes on with the rest
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    operation = request.pop("op")
    if operation == "load":
        started = time.perf_counter()
        about = peer.load(Path(request.pop("model")), **request)
        return about | {"load_s": time.perf_counter() - started}
    if operation == "decode":
        return {"tokens_per_s": peer.decode(**request)}
    if operation == "prefill":
        return {"tokens_per_s": peer.prefill(**request)}
    if operation == "ttft":
        return {"ttft_s": peer.ttft(**request)}
    if operation == "memory":
        return memory()
    if operation == "perplexity":
        try:
            nll, tokens = peer.perplexity(**request)
        except NotImplementedError as error:
            return {"unsupported": str(error)}
        return {"nll": nll, "tokens": tokens}
    raise ValueError(f"unknown operation {operation!r}")


def memory() -> dict[str, int]:
    """What this process has held at most, and how much of what it holds now no file backs (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kilobytes = {
        name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "kB" in value
    }
    return {"peak_rss_bytes": 1024 * kilobytes["VmHWM"], "anonymous_bytes": 1024 * kilobytes["RssAnon"]}


def steady_rate(times_s: Sequence[Sequence[float]]) -> float:
    """Tokens/s between the last sequence's first token and the first sequence's last one.

    `times_s` holds the moments of every sequence's tokens. Raises ValueError when they do not overlap.
    """
    start = max(times[0] for times in times_s)
    end = min(times[-1] for times in times_s)
    tokens = sum(start < moment <= end for times in times_s for moment in times)
    if end <= start or not tokens:
        raise ValueError("the sequences never decoded all at the same time: ask for more tokens")
    return tokens / (end - start)


def tokens_to_ask(tokens: int, sequences: int) -> int:
    """How long answers must be for `tokens` steps of overlap, when prompts come in one a step."""
    return tokens + sequences + 8


def file_bytes(*files: Path) -> int:
    return sum(file.stat().st_size for file in files)
