"""ONNX Runtime on the device: ours to use, not to install."""

from __future__ import annotations

from stillhouse.engine.errors import StillhouseError

INSTALL_RUNTIME = "on a Jetson: onnxruntime-gpu from JetPack's own index; elsewhere: pip install 'stillhouse[edge,cpu]'"


def require_onnxruntime() -> None:
    """Raises StillhouseError, saying what to install, where no ONNX Runtime is there that can be imported."""
    try:
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "onnxruntime":
            raise StillhouseError("no ONNX Runtime is installed", hint=INSTALL_RUNTIME) from None
        # What is not found below it is its compiled part: the wheel is of another Python or another processor.
        if not (error.name or "").startswith("onnxruntime."):
            raise
        raise _broken(error) from error
    except Exception as error:  # whatever a broken installation throws
        raise _broken(error) from error


def _broken(error: Exception) -> StillhouseError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return StillhouseError(
        f"ONNX Runtime cannot be imported: {first[:200]}", hint=f"install it anew: {INSTALL_RUNTIME}"
    )
