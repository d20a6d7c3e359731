"""`stillhouse edge bench`: how fast a version answers on this device, and at what power.

One request at a time: prompts of random tokens, greedy answers of a fixed length (the end token does not end them).
TTFT is from submitting to the first token; prefill tokens/s are the prompt's tokens over it; decode tokens/s are
(tokens − 1) over the time from the first token to the last, as aiperf has them. J/token is the energy of whole
requests over the tokens that they generated.
"""

from __future__ import annotations

import itertools
import os
import platform
import queue
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, quantiles, stdev
from typing import Any

import numpy as np

from stillhouse.edge.device import Device
from stillhouse.edge.power import Recorder
from stillhouse.engine.answer import Chunk
from stillhouse.engine.model import LanguageModel
from stillhouse.engine.sampling import SamplingParams

SCHEMA = 1
# The grid of the sweeps published for Orin boards with llama.cpp (DESIGN §8).
GRID_PROMPT_TOKENS = (128, 256, 512, 1024, 2048)
GRID_OUTPUT_TOKENS = (64, 128, 256)
GRID_REPEATS = 20
_IDLE_S = 2.0
_SEED = 20261126


@dataclass(frozen=True, slots=True)
class Shape:
    """What is asked for: tokens of prompt and of answer."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Timed:
    """One request's times in seconds."""

    prompt_tokens: int
    ttft_s: float
    between_s: tuple[float, ...]

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.ttft_s

    @property
    def decode_tokens_per_s(self) -> float:
        return len(self.between_s) / sum(self.between_s)


def bench(
    model: LanguageModel,
    shapes: Sequence[Shape],
    repeats: int,
    device: Device,
    tell: Callable[[str], None],
    *,
    warm_up: int = 1,
    idle_s: float = _IDLE_S,
) -> dict[str, Any]:
    """The report for all shapes. Raises InvalidRequest where one does not fit the context."""
    with Recorder(device) as idle:
        time.sleep(idle_s)
    cells = []
    for shape in shapes:
        tell(f"prompt {shape.prompt_tokens}, answer {shape.output_tokens} tokens")
        # Made before: what that takes is no part of a request's energy.
        prompts = [_random_prompt(model, shape.prompt_tokens, seed) for seed in range(warm_up + repeats)]
        for prompt_ids in prompts[:warm_up]:
            _time_request(model, prompt_ids, shape.output_tokens)
        with Recorder(device) as recorder:
            timed = [_time_request(model, prompt_ids, shape.output_tokens) for prompt_ids in prompts[warm_up:]]
        cells.append(_cell(shape, timed, recorder))
    return {
        "schema": SCHEMA,
        "device": describe_device(device),
        "model": describe_model(model),
        "idle": idle.recording.summary(),
        "cells": cells,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _cell(shape: Shape, timed: Sequence[Timed], recorder: Recorder) -> dict[str, Any]:
    between_ms = [gap * 1000 for each in timed for gap in each.between_s]
    energy = recorder.recording.energy_joules
    return {
        "prompt_tokens": shape.prompt_tokens,
        "output_tokens": shape.output_tokens,
        "requests": len(timed),
        "prefill_tokens_per_s": spread([each.prefill_tokens_per_s for each in timed]),
        "decode_tokens_per_s": spread([each.decode_tokens_per_s for each in timed]),
        "ttft_ms": spread([each.ttft_s * 1000 for each in timed]),
        "between_tokens_ms": {"p50": percentile(between_ms, 50), "p95": percentile(between_ms, 95)},
        "energy_joules": energy,
        "joules_per_token": None if energy is None else energy / (len(timed) * shape.output_tokens),
        **recorder.recording.summary(),
    }


def _time_request(model: LanguageModel, prompt_ids: Sequence[int], output_tokens: int) -> Timed:
    """One request; the moments are taken on the engine's thread, when a token is there."""
    moments: list[float] = []
    ended: queue.SimpleQueue[Chunk] = queue.SimpleQueue()

    def take(chunk: Chunk) -> None:
        if chunk.token_ids:
            moments.append(time.perf_counter())
        if chunk.finish_reason is not None:
            ended.put(chunk)

    params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    begun_s = time.perf_counter()
    model.submit(prompt_ids, params, take)
    last = ended.get()
    if last.error is not None:
        raise last.error
    gaps = tuple(after - before for before, after in itertools.pairwise(moments))
    return Timed(len(prompt_ids), moments[0] - begun_s, gaps)


def _random_prompt(model: LanguageModel, tokens: int, seed: int) -> list[int]:
    """Other tokens each time: no prompt finds the beginning of another one in the cache."""
    special = model.tokenizer.special_ids
    ordinary = np.array([token for token in range(model.version.manifest.network.vocab_size) if token not in special])
    return [int(token) for token in np.random.default_rng(_SEED + seed).choice(ordinary, tokens)]


def describe_device(device: Device) -> dict[str, Any]:
    """What two people must have alike to compare their figures."""
    mode = device.power_mode()
    return {
        "module": device.module(),
        "model": device.model() or device.processor(),
        "l4t": device.l4t(),
        "jetpack": device.jetpack(),
        "power_mode": None if mode is None else {"id": mode.number, "name": mode.name},
        "clocks": [
            {"name": clock.name, "min_mhz": clock.min_mhz, "max_mhz": clock.max_mhz, "pinned": clock.pinned}
            for clock in device.clocks()
        ],
        "cores": os.cpu_count(),
        "memory_bytes": device.memory().total_bytes,
        "python": platform.python_version(),
    }


def describe_model(model: LanguageModel) -> dict[str, Any]:
    """The version, and what runs it."""
    import onnxruntime as ort

    manifest = model.version.manifest
    return {
        "model": manifest.model,
        "version": manifest.version,
        "precision": manifest.precision,
        "target": manifest.target,
        "weights_bytes": manifest.memory.weights_bytes,
        "max_model_len": model.max_model_len,
        "provider": model.provider,
        "threads": model.threads,  # None: one a core
        "onnxruntime": ort.__version__,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation, and both ends."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean(values), "stdev": deviation, "min": min(values), "max": max(values)}


def percentile(values: Sequence[float], percent: int) -> float | None:
    """Interpolated between neighbours; None where there is nothing between two tokens."""
    if len(values) < 2:
        return values[0] if values else None
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shapes_of(prompt_tokens: Sequence[int], output_tokens: Sequence[int]) -> Iterator[Shape]:
    """Every pair."""
    for prompt in prompt_tokens:
        for output in output_tokens:
            yield Shape(prompt, output)
