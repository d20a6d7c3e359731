"""Opens ONNX Runtime sessions: which provider, which file, with packed weights where they can be had."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import onnxruntime as ort

from stillhouse.engine.directory import VersionDirectory
from stillhouse.engine.errors import EngineError
from stillhouse.engine.providers import why_not
from stillhouse.engine.resident import paged_out, released_after, trim_heap
from stillhouse.engine.weights_cache import is_packed, prepacked_model

log = logging.getLogger(__name__)

# A step is hundreds of small parallel operators, tens of microseconds apart. A thread that sleeps between them wakes
# late (a tenth of a small step); one that spins for long waits, where anything else wants the cores, for another that
# is not scheduled (decoding was found ten times slower). So it spins as long as the next operator is likely to take,
# and small blocks let the others go on.
_SHARES_THE_CPU = {"session.intra_op.spin_duration_us": "30", "session.dynamic_block_base": "4"}
_OLDER_SHARES_THE_CPU = {"session.intra_op.allow_spinning": "0", "session.dynamic_block_base": "4"}
_KNOWS_SPIN_DURATION = (1, 26)
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# From here on a load may take seconds more, so that it does not take more memory than what is loaded.
_LARGE_BYTES = 10**9
# TensorRT knows none of ONNX Runtime's own operators: attention and 4-bit products are left to CUDA.
_BESIDE = {"tensorrt": ("cuda",)}


def open_session(model_path: Path, *, threads: int | None, provider: str) -> ort.InferenceSession:
    """A session on `provider` (TensorRT: with CUDA beside it), and on no other that may do instead.

    Raises EngineError where the graph or the provider does not load.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in _sharing_the_cpu().items():
        options.add_session_config_entry(key, value)
    if is_packed(model_path):
        # Optimizing it once more finds nothing and costs a third of the time to load.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    names = [PROVIDERS[each] for each in (provider, *_BESIDE.get(provider, ()))]
    if lacking := [name for name in names if name not in ort.get_available_providers()]:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} has no {lacking[0]}; it has {', '.join(ort.get_available_providers())}",
            hint="install the build of ONNX Runtime for your device, or use the CPU",
        )
    try:
        with _read_once(_data_of(model_path)):
            session = ort.InferenceSession(str(model_path), options, providers=names)
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot load {model_path}: {str(error).splitlines()[0]}",
            hint="'stillhouse inspect DIR' tells which versions it was built with",
        ) from error
    # A provider that fails to start is dropped without an error: only the session knows what it really got.
    if lacking := [name for name in names if name not in session.get_providers()]:
        raise EngineError(f"{lacking[0]} does not start on this machine", hint="see ONNX Runtime's log, or use the CPU")
    return session


@contextlib.contextmanager
def _read_once(data: Path) -> Iterator[None]:
    """Takes out of memory what ONNX Runtime reads of `data` only to load it; of a large file already meanwhile."""
    large = data.is_file() and data.stat().st_size >= _LARGE_BYTES
    with released_after(data), paged_out(data) if large else contextlib.nullcontext():
        yield


def _sharing_the_cpu() -> dict[str, str]:
    major, minor = (int(part) for part in ort.__version__.split(".")[:2])
    return _SHARES_THE_CPU if (major, minor) >= _KNOWS_SPIN_DURATION else _OLDER_SHARES_THE_CPU


def choose_provider(wanted: str, target: str) -> str:
    """The provider for a version built for `target`, found by trying; a fall-back to the CPU is said by name.

    One that is asked for is taken or, where it does not work, refused: EngineError.
    """
    provider = target if wanted == "auto" else wanted
    if provider == "cpu":  # every build has it
        return provider
    reasons = [why_not(PROVIDERS[each]) for each in (provider, *_BESIDE.get(provider, ()))]
    reason = next((each for each in reasons if each is not None), None)
    if reason is None:
        return provider
    if wanted == "auto" and provider != "cpu":
        log.warning("built for %s, but %s: running on CPUExecutionProvider", provider.upper(), reason)
        return "cpu"
    raise EngineError(reason, hint="'stillhouse edge doctor' tells what works here and what to install")


def model_to_load(version: VersionDirectory, provider: str) -> Path:
    """The version's graph, with packed weights where the provider is a CPU and they can be had."""
    if provider != "cpu":
        return version.model_path
    return prepacked_model(version, pack_weights, f"onnxruntime {ort.__version__}")


def pack_weights(model_path: Path, target: Path) -> None:
    """Writes `model_path` to `target` with its weights packed for this CPU (see weights_cache.py).

    In two steps, over a file beside: what the optimizer holds has gone when the weights are packed, and memory takes
    the packed weights and little else (of a 1.5B at INT4 1.6 GB in place of 2.0).
    """
    plain = target.with_name(f"plain-{target.name}")
    _save_optimized(model_path, plain, ort.GraphOptimizationLevel.ORT_ENABLE_ALL, "session.disable_prepacking")
    _save_optimized(
        plain,
        target,
        ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "session.save_external_prepacked_constant_initializers",
    )
    for file in (plain, _data_of(plain)):
        file.unlink()


def _save_optimized(model_path: Path, target: Path, level: ort.GraphOptimizationLevel, entry: str) -> None:
    """Opens `model_path` with the session's config `entry` switched on, and saves the graph that came of it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(target)
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", _data_of(target).name),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        (entry, "1"),
    ):
        options.add_session_config_entry(key, value)
    with paged_out(_data_of(model_path)):
        ort.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
    trim_heap()


def _data_of(model_path: Path) -> Path:
    return model_path.with_name(f"{model_path.name}.data")
