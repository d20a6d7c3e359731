"""What a dataset is made from, as hashes: the same inputs are the same version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse.build.cache import key_of
from stillhouse.engine.directory import sha256_of
from stillhouse.tune.data_recipe import DataRecipe, Source
from stillhouse.tune.revisions import DATA, SCORERS, code_of, installed
from stillhouse.tune.source_files import files_of, form_of, label_of


def inputs_of(recipe: DataRecipe, sources: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """All that decides what a dataset holds: the recipe, the hashes of every file that is read, and the code."""
    read, said, code = _other_inputs(recipe), portable(recipe), code_of(DATA)
    if recipe.scoring_model is None:  # then nothing is done with the base
        said |= {"base": None, "revision": None}
    else:
        code |= installed(SCORERS)
    return {"recipe": said, "sources": sources_of(recipe) if sources is None else sources, "read": read} | code


def sources_of(recipe: DataRecipe) -> list[dict[str, Any]]:
    """Every file that is read, named as seen from the recipe, its size and hash; a dataset on the hub by its id."""
    return [file for source in recipe.sources for file in _files(source, recipe.folder, "sources")]


def _files(source: Source, folder: str, key: str) -> list[dict[str, Any]]:
    files = files_of(source, key)
    if form_of(source) == "dataset":
        digest = key_of({str(file.relative_to(source.path)): sha256_of(file) for file in files}) if files else None
        size = sum(file.stat().st_size for file in files) if files else None
        return [{"path": label_of(source.path, folder), "bytes": size, "sha256": digest}]
    return [
        {"path": label_of(str(file), folder), "bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files
    ]


def portable(recipe: DataRecipe) -> dict[str, Any]:
    """The recipe with paths as seen from its folder: the same wherever it lies."""
    plain = recipe.model_dump(mode="json")
    for source in (*plain["sources"], *plain["contamination"]["against"]):
        source["path"] = label_of(source["path"], recipe.folder)
    for table, key in ((plain, "base"), (plain["perplexity"] or {}, "model")):
        if table.get(key):
            table[key] = label_of(table[key], recipe.folder)
    return plain


def _other_inputs(recipe: DataRecipe) -> list[Any]:
    """Hashes of what is read beside the sources: evaluation files, and the scoring model's weights."""
    against = [
        file["sha256"]
        for source in recipe.contamination.against
        for file in _files(source, recipe.folder, "contamination.against")
    ]
    model = sorted(Path(recipe.scoring_model).glob("*.safetensors")) if recipe.scoring_model else []
    return against + [sha256_of(file) for file in model if file.is_file()]
