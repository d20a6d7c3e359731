"""`stillhouse edge doctor`: what this device is and can do, and what to do where it cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stillhouse.edge.device import Device
from stillhouse.edge.fatbin import kernels_of
from stillhouse.edge.power import total_watts
from stillhouse.edge.runtime import INSTALL_RUNTIME

State = Literal["ok", "note", "fail", "unknown"]
UNKNOWN = "unknown"
OLDEST_RUNTIME = (1, 23, 2)
_CUDA = "CUDAExecutionProvider"
# What is no device that a model of ours runs on is not tried.
_TRIED = ("CPUExecutionProvider", _CUDA, "TensorrtExecutionProvider", "NvTensorRtRtxExecutionProvider")
_HOT_C = 90.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: what was looked at, what was found, and what to do where that does not do."""

    name: str
    found: str
    state: State = "ok"
    advice: str = ""


def examine(device: Device) -> list[Check]:
    """All checks, in the order in which a person wants to read them. Nothing here raises for what is missing."""
    return [*_board(device), *_condition(device), *_runtime(device)]


def report(device: Device) -> dict[str, Any]:
    """The same for programs."""
    checks = examine(device)
    usable = [check.name for check in checks if check.name in _TRIED and check.state == "ok"]
    mode = device.power_mode()
    return {
        "jetson": device.is_jetson,
        "module": device.module(),
        "model": device.model(),
        "l4t": device.l4t(),
        "jetpack": device.jetpack(),
        "power_mode": None if mode is None else {"id": mode.number, "name": mode.name},
        "clocks_mhz": {clock.name: clock.mhz for clock in device.clocks()},
        "memory_bytes": device.memory().total_bytes,
        "memory_available_bytes": device.memory().available_bytes,
        "gpu_architecture": device.architecture(),
        "providers": usable,
        "checks": [asdict(check) for check in checks],
    }


def _board(device: Device) -> Iterator[Check]:
    if not device.is_jetson:
        name = device.processor() or UNKNOWN
        yield Check("device", f"no Jetson: an ordinary PC ({name})", "note", "fine for trying; what follows is its own")
        return
    model, module = device.model(), device.module()
    yield _known("device", module or model, "the device tree names no module: is this NVIDIA's kernel?")
    if module and model:
        yield Check("board", model)
    l4t, jetpack = device.l4t(), device.jetpack()
    found = f"JetPack {jetpack or UNKNOWN}, L4T {l4t}" if l4t else None
    yield _known("system", found, "/etc/nv_tegra_release is missing: flash Jetson Linux 36 (JetPack 6) or newer")
    if l4t and int(l4t.partition(".")[0]) < 36:
        yield Check("JetPack 6", f"L4T {l4t} is older", "fail", "flash JetPack 6 or newer: this one's Python is 3.8")
    mode = device.power_mode()
    yield _known("power mode", str(mode) if mode else None, "see 'sudo nvpmodel -q'")


def _condition(device: Device) -> Iterator[Check]:
    if clocks := device.clocks():
        texts = [f"{clock.name} {_number(clock.mhz)} of {_number(clock.max_mhz)} MHz" for clock in clocks]
        pinned = all(clock.pinned for clock in clocks)
        yield Check("clocks", ", ".join(texts) + (", pinned" if pinned else ""))
    elif device.is_jetson:
        yield Check("clocks", UNKNOWN, "unknown", "run it as a user who may read sysfs")
    memory = device.memory()
    total, available = (_gib(size) for size in (memory.total_bytes, memory.available_bytes))
    found = f"{total} in all, {available} available"
    yield Check("memory", found) if memory.available_bytes else Check("memory", found, "unknown", "see /proc/meminfo")
    if not device.is_jetson:
        return
    rails = device.rails()
    watts, of = total_watts(rails)
    texts = [f"{rail.name} {_number(rail.watts, 2)} W" for rail in rails]
    total_text = f"{_number(watts, 2)} W in all ({' + '.join(of)})" if of else "no total"
    yield _known(
        "power",
        f"{', '.join(texts)}; {total_text}" if rails else None,
        "no INA3221 is to be read: figures of power will be missing",
    )
    heat = device.temperatures()
    hottest = max(heat, key=lambda zone: heat[zone], default=None)
    if hottest is None:
        yield Check("temperature", UNKNOWN, "unknown", "no thermal zone is to be read")
    else:
        hot = heat[hottest] >= _HOT_C
        yield Check("temperature", f"{hottest} {heat[hottest]:.1f} °C", "fail" if hot else "ok", _COOL if hot else "")
    alerts, events = device.alerts(), device.over_current_events()
    found = ", ".join(alerts) or "not throttled"
    found += f"; {events} over-current events since the start" if events is not None else ""
    yield Check("throttling", found, "fail" if alerts else "ok", _COOL if alerts else "")


_COOL = "cool it, or choose a lower power mode: 'sudo nvpmodel -m N'"


def _runtime(device: Device) -> Iterator[Check]:
    yield Check("Python", platform.python_version())
    if importlib.util.find_spec("onnxruntime") is None:
        yield Check("ONNX Runtime", "not installed", "fail", INSTALL_RUNTIME)
        return
    try:
        import onnxruntime as ort

        from stillhouse.engine.providers import why_not
    except Exception as error:  # whatever a broken installation throws
        first = (str(error).splitlines() or [type(error).__name__])[0]
        yield Check("ONNX Runtime", f"cannot be imported: {first[:200]}", "fail", f"install it anew: {INSTALL_RUNTIME}")
        return
    yield _version(ort)
    for provider in _TRIED:
        if provider in ort.get_available_providers():
            reason = why_not(provider)
            advice = _advice(provider, device) if reason else ""
            yield Check(provider, reason or "makes a session and runs", "fail" if reason else "ok", advice)
    if _CUDA not in ort.get_available_providers():
        state: State = "fail" if device.is_jetson else "note"
        yield Check(_CUDA, "not in this build", state, _advice(_CUDA, device) if device.is_jetson else "")
    yield from _kernels(device, Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so")


def _version(ort: Any) -> Check:
    installed = sorted({name for name in _distributions() if name.startswith("onnxruntime") and "genai" not in name})
    build = str(getattr(ort, "get_build_info", lambda: "")()).replace("ORT Build Info: ", "")
    found = f"{ort.__version__} from {' and '.join(installed) or 'a source build'}" + (f" ({build})" if build else "")
    if len(installed) > 1:
        advice = "they overwrite each other: uninstall all of them, then install the one you want"
        return Check("ONNX Runtime", found, "fail", advice)
    numbers = tuple(int(part) for part in ort.__version__.split(".")[:3] if part.isdecimal())
    if numbers < OLDEST_RUNTIME:
        return Check("ONNX Runtime", found, "fail", "1.23.2 or newer is needed")
    return Check("ONNX Runtime", found)


def _kernels(device: Device, library: Path) -> Iterator[Check]:
    """Whether the CUDA provider's kernels include this GPU; asked on a Jetson alone, whose GPU is known by its chip."""
    architecture = device.architecture()
    if architecture is None or not library.is_file():
        return
    name = f"CUDA kernels for sm_{architecture}"
    try:
        kernels = kernels_of(library)
    except OSError as error:
        yield Check(name, f"{library} cannot be read: {error.strerror}", "unknown")
        return
    listed = [f"sm_{number}" for number in sorted(kernels.code)] + [f"PTX {number}" for number in sorted(kernels.ptx)]
    found = ", ".join(listed) or "none"
    fits = kernels.fit(architecture)
    yield Check(name, f"the library has {found}", "ok" if fits else "fail", "" if fits else _advice(_CUDA, device))


def _advice(provider: str, device: Device) -> str:
    if provider == "CPUExecutionProvider":
        return f"install ONNX Runtime anew: {INSTALL_RUNTIME}"
    if device.is_jetson:
        return "install onnxruntime-gpu from JetPack's own index (PyPI's has no kernels for Orin), or stay on the CPU"
    return "install the CUDA and cuDNN that this build of ONNX Runtime names, or stay on the CPU"


def _known(name: str, found: str | None, advice: str) -> Check:
    return Check(name, found) if found else Check(name, UNKNOWN, "unknown", advice)


def _distributions() -> Iterator[str]:
    for distribution in importlib.metadata.distributions():
        if name := distribution.metadata["Name"]:
            yield name.lower()


def _number(value: float | None, digits: int = 0) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def _gib(size: int | None) -> str:
    return UNKNOWN if size is None else f"{size / 2**30:.1f} GiB"
