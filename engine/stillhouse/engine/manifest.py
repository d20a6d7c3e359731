"""manifest.json, schema 1: what a version is and how it came to be. Written by build, read by everyone."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# An input that the build gives the graph and the engine binds: the position from which on logits are computed, by
# default 0, all of them.
LOGITS_FROM = "logits_from"

Precision = Literal["fp32", "fp16", "int8", "int4"]
Target = Literal["cpu", "cuda"]


class _Record(BaseModel):
    # A newer build may write more keys; a reader of schema 1 keeps what it knows and ignores the rest.
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class FileRecord(_Record):
    """One file of the version; `path` is relative to the version directory."""

    path: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class BaseRecord(_Record):
    """The base checkpoint: `id` is its public id or folder name, `sha256` covers its weights and config."""

    id: str
    sha256: str


class AdapterRecord(_Record):
    """One LoRA adapter: its id, hash, weight in the merge and its `adapter_config.json`."""

    id: str
    sha256: str
    weight: float = 1.0
    config: dict[str, Any] = Field(default_factory=dict)


class ModelRecord(_Record):
    """The shape of the network; sizes in elements, lengths in tokens."""

    architecture: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    eos_token_ids: list[int]
    bos_token_id: int | None = None


class GateRecord(_Record):
    """The limits that the version was held to; None means not asked for."""

    perplexity_ratio: float | None = None
    top1_agreement: float | None = None
    task_accuracy: float | None = None


class TasksRecord(_Record):
    """How the version answers the recipe's own tasks; `accuracy_share` is its accuracy over the reference's."""

    file: str
    sha256: str
    tasks: int
    accuracy: float
    reference_accuracy: float
    accuracy_share: float


class QualityRecord(_Record):
    """How much of the reference is left, measured teacher-forced on held-out text.

    `kl_mean` is KL(reference ‖ version) in nats a token; `top1_agreement` the share of positions (0…1) at which
    both name the same most likely token. `decode_*` are the same figures measured by one-token decode steps.
    `greedy_agreement` is the mean share of a greedy answer's tokens before it first differs from the reference's.
    """

    reference: str
    text: str
    text_sha256: str
    tokens: int
    perplexity: float
    perplexity_ratio: float
    kl_mean: float
    kl_p99: float | None = None
    top1_agreement: float
    decode_tokens: int = 0
    decode_perplexity_ratio: float | None = None
    decode_top1_agreement: float | None = None
    greedy_prompts: int = 0
    greedy_tokens: int = 0
    greedy_agreement: float | None = None
    tasks: TasksRecord | None = None
    gate: GateRecord = GateRecord()
    passed: bool


class MergeRecord(_Record):
    """What the merge did to the base, and the proof that merged equals attached, by their logits.

    `allowed_logit_difference` is the larger of 1e-4 and 5e-6 of the largest logit: FP32's own rounding grows with it.
    Where a model's FP32 is further off than that, the logits of both are computed in FP64 (`logits_in`); 5e-5 of the
    largest is allowed then, as such a model makes much of the merged weights' own rounding.
    A relative change is the norm of a weight's delta over the norm of the weight; `kl_from_base` is
    KL(base ‖ merged) in nats a token, over `kl_tokens` tokens of the evaluation text.
    """

    modules_changed: list[str] = Field(default_factory=list)
    relative_change_max: float = 0.0
    relative_change_median: float = 0.0
    max_logit_difference: float = 0.0
    allowed_logit_difference: float | None = None
    logits_in: Literal["fp32", "fp64"] = "fp32"
    kl_from_base: float | None = None
    kl_tokens: int = 0


class CalibrationRecord(_Record):
    """The text that a version was calibrated on, and how much of it was held out to choose by; its tokens' sha256."""

    text: str
    sha256: str
    tokens: int
    held_out_tokens: int = 0


class CandidateRecord(_Record):
    """One method that the build tried: what it was priced at, and where it was measured, on held-out text."""

    method: str
    kl_estimated: float | None = None
    output_error: float | None = None
    output_error_to_nearest: float | None = None
    bytes: int | None = None
    tokens: int = 0
    perplexity_ratio: float | None = None
    kl_mean: float | None = None
    top1_agreement: float | None = None
    chosen: bool = False
    note: str | None = None


class QuantizationRecord(_Record):
    """How the weights were rounded; `int8_weights` are those that an int4 version keeps at 8 bits.

    `bytes` are of model.onnx and its data, `budget_bytes` of the whole directory. `candidates` is the table that the
    method was chosen from.
    """

    method: str
    block_size: int
    bytes: int
    budget_bytes: int | None = None
    int8_weights: list[str] = Field(default_factory=list)
    calibration: CalibrationRecord | None = None
    candidates: list[CandidateRecord] = Field(default_factory=list)


class MemoryRecord(_Record):
    """Bytes of weights on disk, and of KV cache a token over all layers."""

    weights_bytes: int
    kv_bytes_per_token: int


class Manifest(_Record):
    """The whole of manifest.json (DESIGN §3)."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: str
    model: str
    version: int = Field(ge=1)
    precision: Precision
    target: Target
    created: datetime
    inputs_sha256: str
    base: BaseRecord
    adapters: list[AdapterRecord] = Field(default_factory=list)
    recipe: dict[str, Any]
    tools: dict[str, str]
    files: list[FileRecord]
    network: ModelRecord
    quality: QualityRecord | None = None
    merge: MergeRecord | None = None
    quantization: QuantizationRecord | None = None
    memory: MemoryRecord

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), populate_by_name=True)

    def to_json(self) -> str:
        """The file's text: keys as in the schema, two spaces, a newline at the end."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def schema_json() -> str:
    """The JSON Schema of manifest.json, as docs/manifest.schema.json has it (`stillhouse inspect --schema`)."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema(by_alias=True)}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
