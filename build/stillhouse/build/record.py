"""The manifest of a version that was built: how it came to be, in words that travel (no folder of this machine)."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from stillhouse.build.answers import Replies
from stillhouse.build.plan import Plan, PlannedVersion
from stillhouse.build.verify import Figures
from stillhouse.engine.manifest import (
    AdapterRecord,
    BaseRecord,
    FileRecord,
    Manifest,
    MemoryRecord,
    MergeRecord,
    ModelRecord,
    QualityRecord,
    QuantizationRecord,
)

REFERENCE = "FP32 export of the merged checkpoint"


def manifest_of(
    plan: Plan,
    version: PlannedVersion,
    number: int,
    files: list[FileRecord],
    *,
    created: datetime,
    network: ModelRecord,
    merge: dict[str, Any],
    figures: Figures,
    replies: Replies,
    quantization: dict[str, Any] | None,
) -> Manifest:
    """The manifest of `version` as version `number`; `merge` is what the merge stage returned."""
    recipe, text = plan.recipe, plan.text
    measured = asdict(figures)
    measured.pop("decode_error")
    half = version.method.stage == "convert_fp16" or recipe.target == "cuda"
    kv_floats = 2 * network.layers * network.kv_heads * network.head_dim
    return Manifest(
        name=recipe.name,
        model=version.model,
        version=number,
        precision=version.precision,
        target=recipe.target,
        created=created,
        inputs_sha256=version.inputs_sha256,
        base=BaseRecord(id=plan.base.id, sha256=plan.base.sha256),
        adapters=[
            AdapterRecord(id=a.id, sha256=a.sha256, weight=a.weight, config=_travels(a.config)) for a in plan.adapters
        ],
        recipe=_portable(plan),
        tools=plan.tools,
        files=files,
        network=network,
        quality=QualityRecord(
            reference=REFERENCE,
            text=text.label,
            text_sha256=text.sha256,
            gate=version.gate,
            passed=True,
            greedy_prompts=replies.greedy_prompts,
            greedy_tokens=replies.greedy_tokens,
            greedy_agreement=replies.greedy_agreement,
            tasks=replies.tasks,
            **measured,
        ),
        merge=MergeRecord.model_validate(merge),
        quantization=QuantizationRecord.model_validate(quantization) if quantization else None,
        memory=MemoryRecord(
            weights_bytes=sum(file.bytes for file in files if file.path.startswith("model.onnx")),
            kv_bytes_per_token=kv_floats * (2 if half else 4),
        ),
    )


def _portable(plan: Plan) -> dict[str, Any]:
    """The resolved recipe with ids in place of folders."""
    resolved = plan.recipe.model_dump()
    resolved["base"] = plan.base.id
    for entry, adapter in zip(resolved["adapters"], plan.adapters, strict=True):
        entry["path"] = adapter.id
    for options in resolved["quantize"].values():
        options["calibration"] = Path(options["calibration"]).name if options["calibration"] else None
    resolved["evaluate"]["text"] = plan.text.label if plan.recipe.evaluate.text else None
    resolved["evaluate"]["tasks"] = plan.tasks.label if plan.tasks else None
    for key in ("records", "general", "general_tasks"):  # which a build does not read
        del resolved["evaluate"][key]
    return resolved


def _travels(config: dict[str, Any]) -> dict[str, Any]:
    """An adapter's config without the folder that its base lay in where it was trained."""
    named = str(config.get("base_model_name_or_path"))
    return {**config, "base_model_name_or_path": Path(named).name} if named.startswith("/") else config
