from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("numpy", "onnxruntime", "tritonclient", "tokenizers", "torch", "transformers")


@pytest.mark.parametrize("module", ["stillhouse.serve.commands", "stillhouse.serve.launcher"])
def test_serving_is_set_up_without_what_only_models_need(module: str) -> None:
    program = f"import sys, {module}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
