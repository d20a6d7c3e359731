"""Verify: how much of the FP32 reference is left in a version, measured by the engine that will serve it.

Teacher-forced, on held-out text: in windows by prefill, and on a part of them by one-token decode over several slots,
because these are different kernels and a graph can be right in one and broken in the other. The reference's
log-probabilities are computed once and lie on disk meanwhile, so that one session is open at a time.
Runs in a worker process.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.build.checkpoint import context_length_of
from stillhouse.build.worker import Share
from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.manifest import GateRecord, ModelRecord

Floats = NDArray[np.float32]

DECODE_SLOTS = 8
DECODE_STEPS = 48
_ROWS = 16  # rows of a window that are worked on at a time: 16 × 49,152 floats stay near the cache
_SURE = 3.0  # standard errors that decode must be beyond its gate to fail it


@dataclass(frozen=True, slots=True)
class Figures:
    """Fidelity to the reference; `kl_*` in nats a token, `*_agreement` 0…1, `decode_error` of the log of its ratio."""

    tokens: int
    perplexity: float
    perplexity_ratio: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    decode_tokens: int
    decode_perplexity_ratio: float
    decode_top1_agreement: float
    decode_error: float


class Spool:
    """The reference's log-probabilities on disk, (windows, rows, width) float32, read a few rows at a time."""

    def __init__(self, path: Path, *, rows: int, width: int) -> None:
        self._stream = path.open("rb")
        self._rows, self._width = rows, width

    def read(self, window: int, row: int, count: int) -> Floats:
        """Rows row … row + count − 1 of a window (count, width)."""
        self._stream.seek((window * self._rows + row) * self._width * 4)
        return np.fromfile(self._stream, np.float32, count * self._width).reshape(count, self._width)


def reference(
    share: Share, *, model: str, network: dict[str, Any], windows: list[list[int]], spool: str
) -> dict[str, Any]:
    """Writes the reference's log-probabilities (windows, W − 1, V) float32 to `spool`; returns its perplexity.

    Position p of a window predicts token p + 1; the last one predicts nothing and is left out.
    """
    runner = _runner(model, network, slots=1, length=len(windows[0]))
    loss = 0.0
    with Path(spool).open("wb") as stream:
        for index, window in enumerate(windows):
            logits = runner.prefill(0, window, 0)[:-1]
            targets = np.asarray(window[1:])
            for start in range(0, len(targets), _ROWS):
                rows = log_softmax(logits[start : start + _ROWS])
                loss -= float(_picked(rows, targets[start : start + _ROWS]).sum())
                stream.write(rows.data)  # not tofile, which forgets why it could not write
            share((index + 1) / len(windows))
    tokens = len(windows) * (len(windows[0]) - 1)
    return {"perplexity": math.exp(loss / tokens), "tokens": tokens}


def fidelity(
    share: Share, *, model: str, network: dict[str, Any], windows: list[list[int]], spool: str
) -> dict[str, Any]:
    """The Figures of the graph at `model` against the log-probabilities that `reference` wrote to `spool`."""
    record = ModelRecord.model_validate(network)
    # Read, not mapped: what is mapped counts as this process's memory.
    expected = Spool(Path(spool), rows=len(windows[0]) - 1, width=record.vocab_size)
    runner = _runner(model, network, slots=min(DECODE_SLOTS, len(windows)), length=len(windows[0]))
    losses: list[NDArray[np.float64]] = []
    reference_losses: list[NDArray[np.float64]] = []
    divergences: list[NDArray[np.float64]] = []
    agreed = 0
    for index, window in enumerate(windows):
        logits = runner.prefill(0, window, 0)[:-1]
        targets = np.asarray(window[1:])
        for start in range(0, len(targets), _ROWS):
            rows = log_softmax(logits[start : start + _ROWS])
            known = expected.read(index, start, len(rows))
            wanted = targets[start : start + _ROWS]
            losses.append(-_picked(rows, wanted))
            reference_losses.append(-_picked(known, wanted))
            divergences.append(divergence(known, rows))
            agreed += int((rows.argmax(-1) == known.argmax(-1)).sum())
        share(0.9 * (index + 1) / len(windows))
    loss, reference_loss, kl = (np.concatenate(parts) for parts in (losses, reference_losses, divergences))
    decoded = _decode(runner, windows, expected)
    share(1.0)
    figures = Figures(
        tokens=len(loss),
        perplexity=_exp(loss.mean()),
        perplexity_ratio=_exp(loss.mean() - reference_loss.mean()),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=agreed / len(loss),
        **decoded,
    )
    _refuse_not_finite(figures)
    return asdict(figures)


def judge(figures: Figures, gate: GateRecord) -> str | None:
    """None where the version holds its gate, else the reason in a few words.

    Decode is measured on fewer tokens: it fails only where it is beyond the gate by more than three standard errors.
    """
    ratio, agreement = gate.perplexity_ratio, gate.top1_agreement
    if ratio is not None:
        if not figures.perplexity_ratio <= ratio:
            return f"perplexity ratio {figures.perplexity_ratio:.4f} is above {ratio:g}"
        least = math.log(figures.decode_perplexity_ratio) - _SURE * figures.decode_error
        if not least <= math.log(ratio):
            return f"one-token decode's perplexity ratio {figures.decode_perplexity_ratio:.4f} is above {ratio:g}"
    if agreement is not None and not figures.top1_agreement >= agreement:
        return f"top-1 agreement {figures.top1_agreement:.4f} is below {agreement:g}"
    return None


def probe(share: Share, *, directory: str) -> dict[str, Any]:
    """Opens the version at `directory` as a server would, files re-hashed, and generates a few tokens."""
    from stillhouse.engine.model import LanguageModel
    from stillhouse.engine.options import EngineOptions
    from stillhouse.engine.sampling import SamplingParams

    options = EngineOptions(max_num_seqs=1, weights_cache=False)
    with LanguageModel.load(Path(directory), options, verify=True) as model:
        share(0.5)
        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        completion = model.generate(model.prompt_ids(text="The capital of France is"), params)
    if completion.num_output_tokens != 4:
        raise StillhouseError(
            f"{directory} generated {completion.num_output_tokens} tokens of 4", hint="see the build log"
        )
    share(1.0)
    return {"text": completion.text}


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities (N, V) of `logits` (N, V)."""
    shifted: Floats = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def divergence(reference: Floats, other: Floats) -> NDArray[np.float64]:
    """KL(reference ‖ other) in nats (N,), of log-probabilities (N, V)."""
    terms = np.exp(reference)
    terms *= reference - other
    kl: NDArray[np.float64] = terms.sum(-1, dtype=np.float64)
    return kl


def _decode(runner: Any, windows: list[list[int]], expected: Spool) -> dict[str, Any]:
    """Teacher-forced one-token decode: a window a slot, each behind a prefix of another length."""
    width = len(windows[0])
    slots = min(DECODE_SLOTS, len(windows))
    prefixes = [width // 8 + slot * max(1, width // 64) for slot in range(slots)]
    steps = min(DECODE_STEPS, width - 1 - max(prefixes))
    for slot, prefix in enumerate(prefixes):
        runner.prefill(slot, windows[slot][:prefix], 0)
    losses: list[float] = []
    reference_losses: list[float] = []
    agreed = 0
    for step in range(steps):
        at = [prefix + step for prefix in prefixes]
        rows = log_softmax(runner.decode([windows[slot][place] for slot, place in enumerate(at)], at))
        for slot, place in enumerate(at):
            target = windows[slot][place + 1]
            known = expected.read(slot, place, 1)[0]
            losses.append(-float(rows[slot, target]))
            reference_losses.append(-float(known[target]))
            agreed += int(rows[slot].argmax() == known.argmax())
    difference = np.asarray(losses) - np.asarray(reference_losses)
    return {
        "decode_tokens": len(losses),
        "decode_perplexity_ratio": _exp(difference.mean()),
        "decode_top1_agreement": agreed / len(losses),
        "decode_error": float(difference.std(ddof=1) / math.sqrt(len(difference))),
    }


def _runner(model: str, network: dict[str, Any], *, slots: int, length: int) -> Any:
    from stillhouse.engine.runner import OrtRunner

    return OrtRunner(Path(model), network=ModelRecord.model_validate(network), slots=slots, max_len=length)


def _picked(log_probabilities: Floats, targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """The log-probability of each row's target (N,)."""
    picked: NDArray[np.float64] = np.take_along_axis(log_probabilities, targets[:, None], -1)[:, 0].astype(np.float64)
    return picked


def _exp(value: Any) -> float:
    """e to the `value`; infinity where that is more than a float holds."""
    return float(np.exp(np.minimum(value, 700.0)))


def _refuse_not_finite(figures: Figures) -> None:
    bad = [name for name, value in asdict(figures).items() if not math.isfinite(value)]
    if bad:
        raise StillhouseError(
            f"the graph's logits are not finite ({', '.join(bad)})",
            hint="the weights overflow in this precision; leave it out of precisions, or see the build log",
        )


def read_network(checkpoint: Path) -> ModelRecord:
    """The network's shape from a checkpoint's config.json and generation_config.json."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    generation_file = checkpoint / "generation_config.json"
    generation = json.loads(generation_file.read_text("utf-8")) if generation_file.is_file() else {}
    heads = int(config["num_attention_heads"])
    return ModelRecord(
        architecture=config["architectures"][0],
        layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocab_size=int(config["vocab_size"]),
        context_length=context_length_of(config),
        eos_token_ids=_as_list(generation.get("eos_token_id", config.get("eos_token_id"))),
        bos_token_id=config.get("bos_token_id"),
    )


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
