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
from stillhouse.engine.manifest import LOGITS_FROM

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
        # The builder names "its" git commit in the graph, which is that of whatever checkout the environment lies in.
        os.environ["GIT_DIR"] = cache
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
    add_logits_from(Path(destination) / "model.onnx")
    share(1.0)
    return {}


def add_logits_from(model_path: Path) -> None:
    """Lets a caller have the logits from a position on, without computing those before it.

    The graph gets the input `logits_from` INT64[1] with the default 0, all positions (ONNX IR: an initializer that is
    an input too may be left out). A prefill needs the last position alone, and the head is a fifth of a small model.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(str(model_path), load_external_data=False)
    graph = model.graph
    head = next(node for node in graph.node if "logits" in node.output)
    constants = {LOGITS_FROM: 0, "logits_from/end": np.iinfo(np.int64).max, "logits_from/axis": 1}
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    graph.input.append(helper.make_tensor_value_info(LOGITS_FROM, TensorProto.INT64, [1]))
    rows = helper.make_node("Slice", [head.input[0], *constants], ["logits_from/hidden"], name="logits_from/Slice")
    head.input[0] = rows.output[0]
    # Nodes are kept in topological order: the slice comes right before the head.
    nodes = list(graph.node)
    nodes.insert(next(place for place, node in enumerate(nodes) if "logits" in node.output), rows)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    onnx.save(model, str(model_path))
