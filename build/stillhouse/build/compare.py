"""Two versions side by side: how they were made, what they weigh, how good they are."""

from __future__ import annotations

from typing import Any

from stillhouse.engine.manifest import Manifest

_PARTS = ("base", "adapters", "recipe", "tools", "network", "merge", "memory", "quality")
_ALWAYS = (
    "model", "version", "precision", "target", "created", "weights", "memory.weights_bytes", "quality.perplexity",
    "quality.perplexity_ratio", "quality.kl_mean", "quality.top1_agreement", "quality.greedy_agreement",
    "quality.tasks.accuracy_share", "quantization.method", "quantization.int8_weights", "quantization.budget_bytes",
)  # fmt: skip


def differences(left: Manifest, right: Manifest) -> list[dict[str, Any]]:
    """Rows {key, left, right, same}: what everyone wants to see, then all else that is not the same."""
    both = [_facts(manifest) for manifest in (left, right)]
    keys = [*_ALWAYS, *sorted((both[0].keys() | both[1].keys()) - set(_ALWAYS))]
    rows = [{"key": key, "left": both[0].get(key), "right": both[1].get(key)} for key in keys]
    rows = [row | {"same": row["left"] == row["right"]} for row in rows]
    return [
        row
        for row in rows
        if not row["same"] or (row["key"] in _ALWAYS and (row["left"], row["right"]) != (None, None))
    ]


def _facts(manifest: Manifest) -> dict[str, Any]:
    """The manifest as one level of keys; of the weights, the sha256."""
    record = manifest.model_dump(mode="json", by_alias=True)
    facts = {key: record[key] for key in ("model", "version", "precision", "target", "created")}
    facts |= {f"file {file.path}": f"{file.bytes:,} bytes, {file.sha256[:12]}…" for file in manifest.files}
    weights = [file for file in manifest.files if file.path.startswith("model.onnx")]
    facts["weights"] = ", ".join(file.sha256[:12] + "…" for file in weights)
    for part in _PARTS:
        facts |= _flat(part, record[part])
    if (rounding := record["quantization"]) is not None:
        facts |= _flat("quantization", {key: rounding[key] for key in ("method", "block_size", "budget_bytes")})
        facts["quantization.int8_weights"] = len(rounding["int8_weights"])
        facts |= _flat("quantization.calibration", rounding["calibration"])
    return facts


def _flat(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        flat: dict[str, Any] = {}
        for name, inner in value.items():
            flat |= _flat(f"{key}.{name}", inner)
        return flat
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return _flat(key, {str(place): inner for place, inner in enumerate(value)})
    if isinstance(value, list):
        return {key: ", ".join(map(str, value))}
    return {key: value}
