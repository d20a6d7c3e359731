"""The tokenizer of a merged checkpoint: whose it is, and its chat template in a file of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from stillhouse.build.checkpoint import read_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


def write_tokenizer(base: Path, adapters: list[Path], destination: Path, *, trust_remote_code: bool = False) -> None:
    """The last tokenizer that an adapter brings, or the base's, as tokenizer.json with its chat template beside."""
    source = next((path for path in reversed(adapters) if (path / "tokenizer.json").is_file()), base)
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
    _lift_chat_template(destination, base)


def _lift_chat_template(folder: Path, base: Path) -> None:
    """Older checkpoints keep the template inside tokenizer_config.json; a version has it in a file of its own."""
    template = folder / "chat_template.jinja"
    for source in (folder, base):
        if template.is_file():
            return
        if (source / template.name).is_file():
            shutil.copyfile(source / template.name, template)
        elif (source / "tokenizer_config.json").is_file():
            inside = read_json(source / "tokenizer_config.json").get("chat_template")
            if isinstance(inside, str):
                template.write_text(inside, "utf-8")
