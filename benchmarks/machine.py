"""What this machine is, without saying whose: processor, cores, instruction sets, memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path

# What the kernels of 4-bit matrix products choose by.
INSTRUCTION_SETS = (
    *("avx2", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "sve", "bf16"),  # Arm
)


def describe(cpuinfo: Path = Path("/proc/cpuinfo"), meminfo: Path = Path("/proc/meminfo")) -> dict[str, object]:
    """{"processor", "cores", "instruction_sets", "memory_bytes", "system", "python"}; what is not known is left out."""
    about: dict[str, object] = {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if cpuinfo.is_file():
        fields = dict(_fields(cpuinfo))
        about["processor"] = fields.get("model name", about["processor"])
        flags = (fields.get("flags") or fields.get("Features", "")).split()
        about["instruction_sets"] = [name for name in INSTRUCTION_SETS if name in flags]
    if meminfo.is_file():
        about["memory_bytes"] = 1024 * int(dict(_fields(meminfo))["MemTotal"].split()[0])
    return about


def _fields(file: Path) -> list[tuple[str, str]]:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [
        (name.strip(), value.strip()) for name, separator, value in (line.partition(":") for line in lines) if separator
    ]
