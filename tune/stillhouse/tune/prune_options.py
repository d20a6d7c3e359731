"""[prune] of a recipe: what is to go, refused by name before a weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from stillhouse.build.tables import validated
from stillhouse.engine.errors import UsageError

REPORT = "prune.json"  # in the result's folder


class PruneOptions(BaseModel):
    """[prune]: the share of attention heads and the number of layers that go; healing is [tune] on what is left."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heads: float = Field(default=0.2, ge=0, lt=1)
    layers: int = Field(default=0, ge=0)
    examples: int = Field(default=128, ge=1)
    heal_epochs: int = Field(default=1, ge=0)
    output: str = "pruned"


def prune_options(table: dict[str, Any], path: Path) -> PruneOptions:
    """The options in the table [prune] of the recipe at `path`. Raises UsageError that names the key."""
    options = validated(path, PruneOptions, table, within=("prune",))
    if not options.heads and not options.layers:
        raise UsageError(f"{path}: prune: heads = 0 and layers = 0: nothing would go")
    output = (path.resolve().parent / Path(options.output).expanduser()).resolve()
    return options.model_copy(update={"output": str(output)})
