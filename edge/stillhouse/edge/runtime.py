"""ONNX Runtime on the device: ours to use, not to install."""

from __future__ import annotations

import importlib.util

from stillhouse.engine.errors import StillhouseError

INSTALL_RUNTIME = "on a Jetson: onnxruntime-gpu from JetPack's own index; elsewhere: pip install 'stillhouse[edge,cpu]'"


def require_onnxruntime() -> None:
    """Raises StillhouseError, saying what to install, where no ONNX Runtime can be imported."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise StillhouseError("no ONNX Runtime is installed", hint=INSTALL_RUNTIME)
