"""engine.json: how an engine runs a version. Build writes it beside the versions; serve and edge override it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillhouse.engine.errors import UsageError

ENGINE_JSON = "engine.json"


class EngineOptions(BaseModel):
    """Limits and sizes of one engine; None means: derived from the model and the machine."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    max_num_seqs: int = Field(default=32, ge=1, description="sequences that decode at the same time (slots)")
    max_model_len: int | None = Field(default=None, ge=8, description="context served, in tokens")
    kv_cache_bytes: int | None = Field(default=None, ge=1, description="budget of the KV cache, in bytes")
    kv_cache_share: float | None = Field(default=None, gt=0, le=1, description="the same, as a share of all memory")
    prefill_chunk_tokens: int = Field(default=128, ge=3, description="tokens of a prompt between two decode steps")
    prefill_alone_tokens: int = Field(default=512, ge=3, description="the same, while nothing decodes")
    prefix_slots: int = Field(default=4, ge=0, description="prompts kept, so that others that begin alike reuse them")
    max_waiting: int | None = Field(
        default=None,
        ge=0,
        description="requests that may wait for a slot; None: as many as there are slots, 4 at least",
    )
    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = Field(
        default="auto", description="ONNX Runtime's execution provider; auto: the one that the version was built for"
    )
    weights_cache: bool = Field(default=True, description="keep packed weights on disk and map them")
    threads: int | None = Field(default=None, ge=1, le=512, description="ONNX Runtime's threads; None: one a core")


def read_options(model_directory: Path, overrides: dict[str, object] | None = None) -> EngineOptions:
    """The options in `model_directory`/engine.json (defaults where there is none), with `overrides` on top.

    Raises UsageError naming the key that is unknown or out of range.
    """
    file = model_directory / ENGINE_JSON
    try:
        options = EngineOptions.model_validate_json(file.read_bytes()) if file.is_file() else EngineOptions()
        merged = options.model_dump() | {key: value for key, value in (overrides or {}).items() if value is not None}
        return EngineOptions.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"engine option {key}: {first['msg']}", hint=f"known: {', '.join(EngineOptions.model_fields)}"
        ) from error
