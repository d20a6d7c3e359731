"""What checkpoints cost: bytes, parameters, and tokens a second in torch, taken in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from stillhouse.build.verify import read_network
from stillhouse.tune.torch_runner import TorchRunner, load

_ROUNDS = 5
_DECODE_STEPS = 24


def costs_of(folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Of each checkpoint its bytes, parameters, KV bytes a token (FP32) and tokens a second (torch, one sequence).

    All are loaded at once and timed in alternating rounds, of which the fastest counts: what else the machine does
    meanwhile meets all of them. The first round warms up.
    """
    models = {name: load(folder) for name, folder in folders.items()}
    networks = {name: read_network(folder) for name, folder in folders.items()}
    length = min(256, *(network.context_length // 2 for network in networks.values()))
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(1 + _ROUNDS):
        for name, model in models.items():
            speeds[name].append(_speeds(TorchRunner(model), length))
    found = {}
    for name, model in models.items():
        prefills, decodes = zip(*speeds[name][1:], strict=True)
        network = networks[name]
        found[name] = {
            "bytes": float(sum(file.stat().st_size for file in folders[name].glob("*.safetensors"))),
            "parameters": float(sum(weight.numel() for weight in model.parameters())),
            "kv_bytes_per_token": 8.0 * network.layers * network.kv_heads * network.head_dim,
            "prefill_tokens_per_s": max(prefills),
            "decode_tokens_per_s": max(decodes),
        }
    return found


def _speeds(runner: TorchRunner, length: int) -> tuple[float, float]:
    """Tokens a second of a prompt of `length` tokens, and of what is decoded behind it."""
    tokens = list(range(3, 3 + length))
    prefill = _rate(lambda: runner.prefill(0, tokens, 0), length)
    return prefill, _rate(lambda: _decode(runner, length), _DECODE_STEPS)


def _decode(runner: TorchRunner, length: int) -> None:
    for step in range(_DECODE_STEPS):
        runner.decode([5], [length + step])


def _rate(work: Callable[[], object], tokens: int) -> float:
    began = time.perf_counter()
    work()
    return tokens / (time.perf_counter() - began)
