"""Quantize: how each precision is made. A precision or a method is one row of METHODS.

The builder's own FP16 graph cannot decode on a CPU, so FP16 is converted. What each row gives is in docs/quantize.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.build.recipe import QuantizeOptions
from stillhouse.build.worker import Share
from stillhouse.engine.errors import UsageError
from stillhouse.engine.manifest import Precision, Target

if TYPE_CHECKING:
    from onnx import GraphProto, TensorProto

_AT_ONCE = 2**22  # values that are converted at a time


@dataclass(frozen=True, slots=True)
class Method:
    """One way to make a precision: `stage` is the worker's; `bits` are those of the linears, 0 where they stay floats.

    `calibrated` ones need text.
    """

    name: str
    stage: str
    bits: int = 0
    calibrated: bool = False
    targets: tuple[Target, ...] = ("cpu", "cuda")


# The first row of a precision is what method = "auto" takes.
METHODS: dict[Precision, tuple[Method, ...]] = {
    "fp32": (Method("builder", "export", targets=("cpu",)),),
    "fp16": (Method("converter", "convert_fp16"),),
    "int8": (Method("rtn", "quantize", 8),),
    "int4": (
        Method("auto", "quantize", 4, calibrated=True),
        Method("gptq", "quantize", 4, calibrated=True),
        Method("k_quant", "quantize", 4),
        Method("hqq", "quantize", 4),
        Method("rtn", "quantize", 4),
    ),
}


def method_of(precision: Precision, options: QuantizeOptions, target: Target) -> Method:
    """The row that `options.method` names.

    Raises UsageError with the methods of this precision, or its targets where it cannot be built for `target`.
    """
    rows = METHODS[precision]
    found = [row for row in rows if options.method in ("auto", row.name)]
    if not found:
        known = ", ".join(dict.fromkeys(["auto", *(row.name for row in rows)]))
        raise UsageError(f"quantize.{precision}.method: unknown method {options.method!r}", hint=f"known: {known}")
    if target not in found[0].targets:
        able = [name for name, methods in METHODS.items() if target in methods[0].targets]
        raise UsageError(
            f"target: {precision} cannot be built for {target} yet",
            hint=f"built for {target}: {', '.join(able)}; {precision} is built for {', '.join(found[0].targets)}",
        )
    return found[0]


def stage_options(method: Method, options: QuantizeOptions) -> dict[str, Any]:
    """What the recipe asks of the quantize stage; nothing for the stages that leave floats.

    Raises UsageError for a word that the precision does not know.
    """
    only_int4 = {"keep_int8", "calibration", "symmetric"}
    if not method.bits:
        asked = options.model_fields_set - {"method"}
    else:
        asked = (options.model_fields_set & only_int4) if method.bits == 8 else set()
    if asked:
        word = min(asked)
        owner = "int4" if word in only_int4 else "int8 and int4"
        raise UsageError(f"quantize: {word} means nothing to {method.name}", hint=f"it is an option of {owner}")
    if options.symmetric and method.name in ("k_quant", "hqq"):
        raise UsageError(
            f"quantize: {method.name} fits a zero point to each block; symmetric = true leaves none",
            hint='leave symmetric out, or take method = "rtn" or "gptq"',
        )
    if not method.bits:
        return {}
    kept = options.model_dump(exclude={"method", "calibration"}, exclude_none=True)
    return {"bits": method.bits, "method": method.name, **kept}


def calibrates(method: Method, options: QuantizeOptions) -> bool:
    """Whether the stage needs calibration text: by its method, or to spend a byte budget by measured sensitivity."""
    return method.calibrated or (method.bits == 4 and has_budget(options))


def has_budget(options: QuantizeOptions) -> bool:
    """Whether the recipe bounds the version's bytes."""
    return options.max_bytes is not None or options.max_bytes_share is not None


def convert_fp16(share: Share, *, source: str, destination: str, target: Target = "cpu") -> dict[str, Any]:
    """The FP32 graph in `source` with half-precision weights and KV cache; `logits` stay float32.

    With the cache in half precision, past and present share one buffer and nothing is cast at a step.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    from stillhouse.build.external import begin, put, values_of

    folder = Path(destination)
    begin(folder)
    model = onnx.load(str(Path(source) / "model.onnx"), load_external_data=False)
    weights = _put_aside(model.graph, Path(source))
    half = convert_float_to_float16(model, keep_io_types=["logits"], disable_shape_infer=True)
    tensors = half.graph.initializer
    for index, tensor in enumerate(tensors):
        if tensor.name in weights:
            values = values_of(weights[tensor.name], Path(source))
            put(tensor, _in_half(values) if tensor.data_type == onnx.TensorProto.FLOAT16 else values, folder)
        share((index + 1) / len(tensors))
    onnx.save(half, str(folder / "model.onnx"))
    settings = (Path(source) / "genai_config.json").read_text("utf-8")
    (folder / "genai_config.json").write_text(settings if target == "cpu" else _for_cuda(settings), "utf-8")
    return {}


def _for_cuda(settings: str) -> str:
    """The text of a genai_config.json with the provider that the model builder names for CUDA."""
    config = json.loads(settings)
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {"enable_cuda_graph": "0"}}]
    return json.dumps(config, indent=4)


def _put_aside(graph: GraphProto, folder: Path) -> dict[str, TensorProto]:
    """Empties the graph's large tensors and returns them by name: the converter needs to know their types alone."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor

    from stillhouse.build.external import LEAST_BYTES

    aside: dict[str, TensorProto] = {}
    for tensor in graph.initializer:
        if not tensor.external_data:
            continue
        if prod(tensor.dims) * 4 < LEAST_BYTES:
            load_external_data_for_tensor(tensor, str(folder))
            continue
        aside[tensor.name] = onnx.TensorProto.FromString(tensor.SerializeToString())
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
        tensor.dims[:] = [0]
        tensor.raw_data = b""
    return aside


def _in_half(values: NDArray[Any]) -> NDArray[np.float16]:
    """The converter's rounding to half precision, which keeps what is not zero from becoming zero, part by part."""
    from onnxruntime.transformers.float16 import convert_np_to_float16

    half = np.empty(values.size, np.float16)
    flat = values.reshape(-1)
    for start in range(0, values.size, _AT_ONCE):
        half[start : start + _AT_ONCE] = convert_np_to_float16(flat[start : start + _AT_ONCE])
    return half.reshape(values.shape)
