"""The tokenizer of a merged checkpoint: whose it is, and its chat template in a file of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from stillhouse.build.checkpoint import read_json
from stillhouse.engine.errors import StillhouseError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


def write_tokenizer(base: Path, adapters: list[Path], destination: Path, *, trust_remote_code: bool = False) -> None:
    """The last tokenizer that an adapter brings, or the base's, as tokenizer.json with its chat template beside.

    Raises StillhouseError where it has several chat templates and none of them is the default.
    """
    source = tokenizer_source(base, adapters)
    if (source / "tokenizer.json").is_file() and (source / "tokenizer_config.json").is_file():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, destination / name)
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            str(source), local_files_only=True, trust_remote_code=trust_remote_code
        )
        tokenizer.save_pretrained(destination)
        shutil.rmtree(destination / "additional_chat_templates", ignore_errors=True)  # an entry has no folders
    _lift_chat_template(destination, [source, base])


def tokenizer_source(base: Path, adapters: list[Path]) -> Path:
    """The folder whose tokenizer the merged checkpoint gets."""
    return next((path for path in reversed(adapters) if (path / "tokenizer.json").is_file()), base)


def misread_before(base: Path, adapters: list[Path]) -> bool:
    """Whether the tokenizer has what older builds lost: chat templates with names, truncation, padding.

    Raises StillhouseError where it has several chat templates and none of them is the default.
    """
    source = tokenizer_source(base, adapters)
    folder, template = _template_in([source, base])
    file = source / "tokenizer.json"
    settings = read_json(file) if file.is_file() else {}
    if isinstance(template, Path | str | None):
        return bool(settings.get("truncation") or settings.get("padding"))
    default_template(folder, template)
    return True


def default_template(folder: Path, inside: Any) -> str:
    """The template in `folder`'s tokenizer_config.json: the one, or of several with names "default", or the only one.

    Raises StillhouseError where there is no such.
    """
    if isinstance(inside, str):
        return inside
    try:
        named = {str(entry["name"]): str(entry["template"]) for entry in inside}
    except (TypeError, KeyError):
        raise StillhouseError(
            f"{folder}/tokenizer_config.json has a chat_template that is no text and no list of named ones",
            hint="copy or download the file again",
        ) from None
    if "default" not in named and len(named) != 1:
        raise StillhouseError(
            f"{folder}/tokenizer_config.json has the chat templates {', '.join(named)}, none of them is the default",
            hint='save the one to serve as chat_template.jinja beside it, or call it "default"',
        )
    return named.get("default") or next(iter(named.values()))


def _lift_chat_template(destination: Path, sources: list[Path]) -> None:
    """Older checkpoints keep the template inside tokenizer_config.json; a version has it in a file of its own."""
    file = destination / "chat_template.jinja"
    folder, template = _template_in(sources)
    if file.is_file() or template is None:
        return
    if isinstance(template, Path):
        shutil.copyfile(template, file)
    else:
        file.write_text(default_template(folder, template), "utf-8")


def _template_in(sources: list[Path]) -> tuple[Path, Any]:
    """The first of the folders that has a template, and the template: its own file, or what its config says."""
    for folder in sources:
        if (file := folder / "chat_template.jinja").is_file():
            return folder, file
        config = folder / "tokenizer_config.json"
        if inside := read_json(config).get("chat_template") if config.is_file() else None:
            return folder, inside
    return sources[0], None
