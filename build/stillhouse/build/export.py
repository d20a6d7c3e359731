"""Export: a checkpoint becomes an ONNX graph by onnxruntime-genai's model builder. Runs in a worker process."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

from stillhouse.build.worker import Share
from stillhouse.engine.errors import StillhouseError

MODEL_FILES = ("model.onnx", "model.onnx.data")
BUILDER = "onnxruntime_genai.models.builder"


def export(
    share: Share, *, checkpoint: str, destination: str, precision: str, target: str, options: dict[str, str]
) -> dict[str, Any]:
    """Builds `checkpoint` into `destination`: model.onnx, model.onnx.data and genai_config.json.

    `precision` and `options` are the builder's own words (`-p`, `--extra_options`). Raises StillhouseError where the
    builder wrote no model.
    """
    share(0.0)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="stillhouse-builder-") as cache:
        arguments = ["-i", checkpoint, "-o", destination, "-p", precision, "-e", target, "-c", cache]
        extra = ["--extra_options", *(f"{key}={value}" for key, value in ({"hf_token": "false"} | options).items())]
        saved, sys.argv = sys.argv, [BUILDER, *arguments, *extra]
        try:
            runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)
        finally:
            sys.argv = saved
    missing = [name for name in (*MODEL_FILES, "genai_config.json") if not (Path(destination) / name).is_file()]
    if missing:
        raise StillhouseError(f"the model builder wrote no {', '.join(missing)}", hint="see the build log")
    for file in Path(destination).iterdir():
        if file.name not in (*MODEL_FILES, "genai_config.json"):
            file.unlink()  # the tokenizer's files come from the checkpoint, byte for byte
    share(1.0)
    return {}
