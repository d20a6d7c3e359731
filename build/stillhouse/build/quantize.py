"""Quantize: how each precision is made. A precision or a method is one row of METHODS.

Figures on a LoRA-merged SmolLM2-135M, as a ratio of perplexity to FP32: the FP16 converter 1.0002 (the builder's own
FP16 graph cannot decode on a CPU), INT8 in blocks of 32 1.005, INT4 k_quant_mixed 1.12 (the builder's default: 1.29).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.build.recipe import QuantizeOptions
from stillhouse.build.worker import Share
from stillhouse.engine.errors import UsageError
from stillhouse.engine.manifest import Precision, Target

# int8 × int8 kernels; level 0 decodes 6 to 16 times slower for 0.6 points of perplexity.
_LEVEL = {"accuracy_level": "4"}


@dataclass(frozen=True, slots=True)
class Method:
    """One way to make a precision: `stage` is the worker's; `options` are the model builder's.

    `memory_factor` is the stage's peak over the FP32 weights' bytes (measured), for `build --dry-run`.
    """

    name: str
    stage: str
    builder_precision: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    blocks: bool = False
    memory_factor: float = 1.5
    targets: tuple[Target, ...] = ("cpu",)


# The first row of a precision is what method = "auto" takes.
METHODS: dict[Precision, tuple[Method, ...]] = {
    "fp32": (Method("builder", "export", "fp32", memory_factor=1.3),),
    "fp16": (Method("converter", "convert_fp16", memory_factor=2.2, targets=("cpu", "cuda")),),
    "int8": (Method("rtn", "export", "int8", _LEVEL, blocks=True, memory_factor=2.8),),
    "int4": (
        Method("k_quant_mixed", "export", "int4", _LEVEL | {"algo_config": "k_quant_mixed"}, True, 4.2),
        Method("k_quant_last", "export", "int4", _LEVEL | {"algo_config": "k_quant_last"}, True, 4.2),
        Method("rtn_last", "export", "int4", _LEVEL | {"algo_config": "rtn_last"}, True, 4.2),
        Method("rtn", "export", "int4", _LEVEL, True, 4.2),
    ),
}


def method_of(precision: Precision, options: QuantizeOptions, target: Target) -> Method:
    """The row that `options.method` names.

    Raises UsageError with the methods of this precision, or its targets where it cannot be built for `target`.
    """
    rows = METHODS[precision]
    found = [row for row in rows if options.method in ("auto", row.name)]
    if not found:
        known = ", ".join(["auto", *(row.name for row in rows)])
        raise UsageError(f"quantize.{precision}.method: unknown method {options.method!r}", hint=f"known: {known}")
    if target not in found[0].targets:
        able = [name for name, methods in METHODS.items() if target in methods[0].targets]
        raise UsageError(
            f"target: {precision} cannot be built for {target} yet",
            hint=f"built for {target}: {', '.join(able)}; {precision} is built for {', '.join(found[0].targets)}",
        )
    return found[0]


def builder_options(method: Method, options: QuantizeOptions) -> dict[str, str]:
    """The method's options for the model builder, with the recipe's block size where there are blocks."""
    return dict(method.options) | ({"block_size": str(options.block_size)} if method.blocks else {})


def convert_fp16(share: Share, *, source: str, destination: str) -> dict[str, Any]:
    """The FP32 graph in `source` with half-precision weights and KV cache; `logits` stay float32.

    With the cache in half precision, past and present share one buffer and nothing is cast at a step.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(str(Path(source) / "model.onnx"))
    share(0.2)
    half = convert_float_to_float16(model, keep_io_types=["logits"], disable_shape_infer=True)
    share(0.8)
    folder = Path(destination)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(
        half,
        str(folder / "model.onnx"),
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1024,
    )
    (folder / "genai_config.json").write_bytes((Path(source) / "genai_config.json").read_bytes())
    share(1.0)
    return {}
