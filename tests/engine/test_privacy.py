"""Nobody is told what an engine does."""

from __future__ import annotations

import os
import subprocess
import sys


def test_onnx_runtimes_reports_are_off_before_it_is_loaded() -> None:
    code = "import os, sys, stillhouse.engine; print('onnxruntime' in sys.modules, os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert said == "False 1\n"
