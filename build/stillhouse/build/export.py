"""Export: a checkpoint becomes an ONNX graph by onnxruntime-genai's model builder. Runs in a worker process."""

from __future__ import annotations

import gc
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
PROBE_TOKENS = 128
ROUNDING = 1e-3  # of the largest logit; FP32's own is 7e-6 (measured), another model's a tenth and more


def export(
    share: Share, *, checkpoint: str, destination: str, precision: str, target: str, options: dict[str, str]
) -> dict[str, Any]:
    """Builds `checkpoint` into `destination`: model.onnx, model.onnx.data and genai_config.json.

    `precision` and `options` are the builder's own words (`-p`, `--extra_options`). Raises StillhouseError where the
    builder wrote no model, or one in FP32 that says something else than the checkpoint.
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
    share(0.7)
    gc.collect()  # the builder's model
    if precision == "fp32":
        refuse_another_model(Path(checkpoint), Path(destination) / "model.onnx")
    share(1.0)
    return {}


def refuse_another_model(checkpoint: Path, model_path: Path) -> None:
    """Raises StillhouseError unless the FP32 graph says what transformers' own layers say, on some tokens.

    All that a version is measured against is this graph: what the builder left out would never be missed.
    """
    import numpy as np
    import torch

    from stillhouse.build.stream import LayerStream
    from stillhouse.build.verify import read_network
    from stillhouse.engine.runner import OrtRunner

    network = read_network(checkpoint)
    length = min(PROBE_TOKENS, network.context_length)
    tokens = np.random.default_rng(0).integers(0, network.vocab_size, length).tolist()
    stream = LayerStream(checkpoint)
    with torch.no_grad():
        hidden = stream.embed(torch.tensor([tokens]))
        for index in range(stream.layers):
            hidden = stream.run(stream.layer(index), hidden)
            stream.release(index)
        expected = (stream.final_norm()(hidden)[0] @ stream.head().T).numpy()
    logits = OrtRunner(model_path, network=network, slots=1, max_len=length).prefill(0, tokens, 0)
    difference, allowed = float(np.abs(logits - expected).max()), ROUNDING * float(np.abs(expected).max())
    if not difference <= allowed:
        raise StillhouseError(
            f"the exported graph is another model than the checkpoint: a logit differs by {difference:.2g}, "
            f"more than {allowed:.2g}",
            hint="something in its config.json is unknown to the model builder; see the build log",
        )


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
