"""Which of ONNX Runtime's execution providers really work here: each is tried with a graph of one addition.

A provider that is listed may lack its libraries, a driver, or kernels for this GPU; only running something tells.
"""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime as ort

# y = x + x over (2,) floats: opset 13, IR version 8, as onnx.helper.make_model writes it.
_TINY_GRAPH = bytes.fromhex(
    "08083a350a0e0a01780a017812017922034164641201675a0f0a0178120a0a08080112040a02080262"
    "0f0a0179120a0a08080112040a02080242040a00100d"
)
_SILENT, _ORT_DEFAULT = 4, 2  # log severities


@functools.cache
def why_not(provider: str) -> str | None:
    """Why the provider (ONNX Runtime's name, e.g. CUDAExecutionProvider) cannot be used; None where it can."""
    if provider not in ort.get_available_providers():
        return f"ONNX Runtime {ort.__version__} has no {provider}"
    # What is missing would be written to stderr as well, in many lines.
    ort.set_default_logger_severity(_SILENT)
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    try:
        session = ort.InferenceSession(_TINY_GRAPH, options, providers=[provider])
        # One that fails to start is dropped without an error: only the session knows what it got.
        if provider not in session.get_providers():
            return f"{provider} does not start on this machine"
        doubled = session.run(None, {"x": np.ones(2, np.float32)})[0]
        return None if doubled.tolist() == [2.0, 2.0] else f"{provider} computes 1 + 1 = {doubled[0]}"
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        return f"{provider} fails: {(str(error).splitlines() or [type(error).__name__])[0][:300]}"
    finally:
        ort.set_default_logger_severity(_ORT_DEFAULT)
