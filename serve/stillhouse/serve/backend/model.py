"""What Triton's Python backend loads for `backend: "stillhouse"`; its work is done in stillhouse.serve."""

from stillhouse.serve.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
