"""What the device says of itself, read from files below one root: module, JetPack, power, heat, clocks, memory.

Written for NVIDIA's Jetson Orin on JetPack 6 (the paths are those of NVIDIA's developer guide, "Platform Power and
Performance", and of the kernel's ina3221, thermal and devfreq drivers); on any other machine most of it is unknown.
Nothing here raises for an entry that is missing, odd or not to be read: None stands for "unknown".
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT_VARIABLE = "STILLHOUSE_EDGE_ROOT"
_TEXT_BYTES = 1 << 20  # more is no text of a kernel
_DPKG_BYTES = 1 << 25
_LINE_CHARACTERS = 120
# The chip's name in the device tree's `compatible`: the compute capability of its GPU.
_ARCHITECTURES = {"tegra234": 87, "tegra194": 72, "tegra264": 110}
# Modules by their part number: a developer kit's model names the carrier board as well.
_MODULES = {
    "p3701-0000": "Jetson AGX Orin",
    "p3701-0004": "Jetson AGX Orin 32GB",
    "p3701-0005": "Jetson AGX Orin 64GB",
    "p3701-0008": "Jetson AGX Orin Industrial",
    "p3767-0000": "Jetson Orin NX 16GB",
    "p3767-0001": "Jetson Orin NX 8GB",
    "p3767-0003": "Jetson Orin Nano 8GB",
    "p3767-0004": "Jetson Orin Nano 4GB",
    "p3767-0005": "Jetson Orin Nano 8GB (developer kit)",
}
_JETPACKS = {"36.2": "6.0 DP", "36.3": "6.0", "36.4": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1"}
_JETPACK_OF_MAJOR = {35: "5", 36: "6", 38: "7", 39: "7"}
_ALERT = re.compile(r"throttle-alert|hot-surface-alert")


@dataclass(frozen=True, slots=True)
class Rail:
    """A power rail of an INA3221."""

    name: str
    volts: float | None
    amperes: float | None

    @property
    def watts(self) -> float | None:
        return None if self.volts is None or self.amperes is None else self.volts * self.amperes


@dataclass(frozen=True, slots=True)
class Clock:
    """A clock and the range that the power mode leaves it, in MHz; pinned where both ends are the same."""

    name: str
    mhz: float | None
    min_mhz: float | None
    max_mhz: float | None

    @property
    def pinned(self) -> bool:
        return self.max_mhz is not None and self.min_mhz == self.max_mhz


@dataclass(frozen=True, slots=True)
class PowerMode:
    """nvpmodel's mode: its number, and its name where /etc/nvpmodel.conf tells it."""

    number: int
    name: str | None

    def __str__(self) -> str:
        return f"{self.name} (mode {self.number})" if self.name else f"mode {self.number}"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of all memory and of what can be had without swapping; one and the same for CPU and GPU on a Jetson."""

    total_bytes: int | None
    available_bytes: int | None


class Device:
    """The machine below `root`: by default that of the variable STILLHOUSE_EDGE_ROOT, else this one."""

    def __init__(self, root: Path | None = None) -> None:
        # Absolute: what is found below it is read by its own path again.
        self.root = (root or Path(os.environ.get(ROOT_VARIABLE) or "/")).absolute()

    # What it is

    @property
    def is_jetson(self) -> bool:
        compatible = self._compatible()
        return "nvidia,tegra" in compatible or "Jetson" in (self.model() or "") or self.l4t() is not None

    def model(self) -> str | None:
        """The board as the device tree names it, e.g. NVIDIA Jetson Orin Nano Developer Kit."""
        return self._line("proc/device-tree/model") or self._line("sys/firmware/devicetree/base/model")

    def module(self) -> str | None:
        """The module by its part number, e.g. Jetson Orin NX 16GB."""
        return next((name for part, name in _MODULES.items() if part in self._compatible()), None)

    def processor(self) -> str | None:
        """The CPU's name in /proc/cpuinfo; ARM's have none there."""
        found = re.search(r"^model name\s*:\s*(.+)$", self._text("proc/cpuinfo") or "", re.MULTILINE)
        return _shown(found[1]) if found else platform.machine() if self._is_this_machine else None

    def architecture(self) -> int | None:
        """The compute capability of the chip's GPU, 87 for sm_87 (Orin); None where it is no known Tegra."""
        compatible = self._compatible()
        known = next((number for chip, number in _ARCHITECTURES.items() if chip in compatible), None)
        return known or (87 if "Orin" in (self.model() or "") else None)

    def l4t(self) -> str | None:
        """Jetson Linux's release, e.g. 36.4.3."""
        found = re.search(
            r"R(\d{1,9})\s*\(release\)\s*,\s*REVISION:\s*(\d+(?:\.\d+)*)", self._text("etc/nv_tegra_release") or ""
        )
        if found:
            return f"{found[1]}.{found[2]}"
        package = re.match(r"\d{1,9}(?:\.\d+)*", self._package("nvidia-l4t-core") or "")
        return package[0] if package else None

    def jetpack(self) -> str | None:
        """JetPack's version: its package's where that is installed, else as far as the L4T release tells it."""
        if package := self._package("nvidia-jetpack"):
            return package.partition("+")[0]
        l4t = self.l4t()
        if l4t is None:
            return None
        return _JETPACKS.get(l4t.removesuffix(".0")) or _JETPACK_OF_MAJOR.get(int(l4t.partition(".")[0]))

    # How it is set

    def power_mode(self) -> PowerMode | None:
        """nvpmodel's mode: the one that it has stored, else the one that it begins with."""
        modes = self._text("etc/nvpmodel.conf") or ""
        found = re.search(r"pmode:\s*(\d{1,9})", self._text("var/lib/nvpmodel/status") or "") or re.search(
            r"^\s*<\s*PM_CONFIG\s+DEFAULT=(\d{1,9})", modes, re.MULTILINE
        )
        if found is None:
            return self._asked_power_mode()
        number = int(found[1])
        name = re.search(rf"^\s*<\s*POWER_MODEL\s+ID={number}\s+NAME=(\S+)", modes, re.MULTILINE)
        return PowerMode(number, _shown(name[1]) if name else None)

    def clocks(self) -> list[Clock]:
        """Those of the CPU's clusters, of the GPU and of the memory (EMC), as far as they can be read."""
        found = []
        for policy in self._entries("sys/devices/system/cpu/cpufreq", "policy*"):
            cores = (self._text(policy / "related_cpus") or "").split()
            name = f"cpu{cores[0]}-{cores[-1]}" if len(cores) > 1 else f"cpu{policy.name.removeprefix('policy')}"
            found.append(
                self._clock(_shown(name), policy, "scaling_cur_freq", "scaling_min_freq", "scaling_max_freq", 1e3)
            )
        for device in self._entries("sys/class/devfreq", "*"):
            names = f"{device.name} {self._text(device / 'device/of_node/name') or ''}".lower()
            kind = "emc" if "emc" in names else "gpu" if re.search(r"gpu|ga10b|gv11b", names) else None
            # JetPack 7 lists the GPU's video decoder behind its cores, as a GPU too.
            if kind and kind not in [clock.name for clock in found]:
                found.append(self._clock(kind, device, "cur_freq", "min_freq", "max_freq", 1e6))
        emc = self.root / "sys/kernel/debug/bpmp/debug/clk/emc"
        if not any(clock.name == "emc" for clock in found) and self._number(emc / "rate") is not None:
            found.append(self._clock("emc", emc, "rate", "min_rate", "max_rate", 1e6))
        return found

    # How it is doing

    def memory(self) -> Memory:
        lines = self._text("proc/meminfo") or ""
        found = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d{1,18}) kB", lines, re.MULTILINE)}
        return Memory(found.get("MemTotal"), found.get("MemAvailable"))

    def rails(self) -> list[Rail]:
        """The rails of every INA3221, by their labels; NC (not connected) and the sum of shunts are none."""
        rails: dict[str, Rail] = {}
        for sensor in self._power_sensors():
            for label in self._entries(sensor, "in*_label"):
                name, channel = self._line(label), label.name.removeprefix("in").removesuffix("_label")
                if name is None or name == "NC" or "sum of shunt" in name.lower() or name in rails:
                    continue
                millivolts, milliamperes = (self._number(sensor / f"{kind}{channel}_input") for kind in ("in", "curr"))
                rails[name] = Rail(name, _scaled(millivolts, 1e-3), _scaled(milliamperes, 1e-3))
        return list(rails.values())

    def temperatures(self) -> dict[str, float]:
        """Degrees Celsius by thermal zone; a zone that is switched off cannot be read, and is left out."""
        found = {}
        for zone in self._entries("sys/class/thermal", "thermal_zone*"):
            name, millidegrees = self._line(zone / "type"), self._number(zone / "temp")
            # Sensors without power report absolute zero and the like.
            if name is not None and millidegrees is not None and -60_000 < millidegrees < 200_000:
                found[name] = millidegrees / 1000
        return found

    def alerts(self) -> list[str]:
        """The throttle alerts that are up now, e.g. cpu-throttle-alert."""
        devices = self._entries("sys/class/thermal", "cooling_device*")
        names = [(self._line(device / "type") or "", self._number(device / "cur_state") or 0) for device in devices]
        return [name for name, state in names if state > 0 and _ALERT.search(name)]

    def over_current_events(self) -> int | None:
        """How often current or voltage made the hardware slow down since it started; None where nobody counts."""
        counts = [
            self._number(file)
            for sensor in self._entries("sys/class/hwmon", "hwmon*")
            for file in self._entries(sensor, "oc*_event_cnt")
        ]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None

    # Reading

    @property
    def _is_this_machine(self) -> bool:
        return self.root == Path("/")

    def _power_sensors(self) -> list[Path]:
        """Where INA3221s show their values: below hwmon, or below their driver where hwmon does not list them."""
        listed = [
            sensor
            for sensor in self._entries("sys/class/hwmon", "hwmon*")
            if "ina3221" in (self._text(sensor / "name") or "")
        ]
        drivers = [*self._entries("sys/bus/i2c/drivers", "ina3221*"), self.root / "sys/bus/i2c/devices"]
        chips = [chip for driver in drivers for chip in self._entries(driver, "[0-9]*-*")]
        return listed + [sensor for chip in chips for sensor in self._entries(chip / "hwmon", "hwmon*")]

    def _clock(self, name: str, folder: Path, now: str, least: str, most: str, per_mhz: float) -> Clock:
        return Clock(name, *(_scaled(self._number(folder / file), 1 / per_mhz) for file in (now, least, most)))

    def _asked_power_mode(self) -> PowerMode | None:
        """What `nvpmodel -q` prints: a name, and the number in a line of its own."""
        if not self._is_this_machine or shutil.which("nvpmodel") is None:
            return None
        try:
            asked = subprocess.run(["nvpmodel", "-q"], capture_output=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        found = re.search(r"NV Power Mode:\s*(\S+)\s+(\d{1,9})", asked.stdout.decode("utf-8", "replace"))
        return PowerMode(int(found[2]), _shown(found[1])) if found else None

    def _compatible(self) -> str:
        return self._text("proc/device-tree/compatible") or self._text("sys/firmware/devicetree/base/compatible") or ""

    def _package(self, name: str) -> str | None:
        """The version of an installed Debian package."""
        status = self._text("var/lib/dpkg/status", _DPKG_BYTES) or ""
        stanza = re.search(rf"^Package: {re.escape(name)}\n(?:.+\n?)*", status, re.MULTILINE)
        version = re.search(r"^Version: (?:\d+:)?(\S+)", stanza[0], re.MULTILINE) if stanza else None
        return _shown(version[1]) if version else None

    def _entries(self, folder: str | Path, pattern: str) -> list[Path]:
        try:
            return sorted((self.root / folder).glob(pattern), key=_by_number)
        except OSError:
            return []

    def _text(self, file: str | Path, most_bytes: int = _TEXT_BYTES) -> str | None:
        """The file's text without the NULs of the device tree; None for one that cannot be read or says nothing."""
        try:
            # A pipe without a writer would be waited for.
            descriptor = os.open(self.root / file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as stream:
                text = (stream.read(most_bytes) or b"").decode("utf-8", "replace")
        except (OSError, ValueError):
            return None
        return text.replace("\0", " ").strip() or None

    def _line(self, file: str | Path) -> str | None:
        """The file's text where it is a name: in one short line that can be printed."""
        return _shown(self._text(file) or "") or None

    def _number(self, file: str | Path) -> int | None:
        found = re.match(r"-?\d{1,18}\b", self._text(file) or "")
        return int(found[0]) if found else None


def _scaled(number: int | None, factor: float) -> float | None:
    return None if number is None else number * factor


def _shown(text: str) -> str:
    """The text without what moves a terminal's cursor or is no character at all, and at most a line of it."""
    return "".join(mark if mark.isprintable() else " " for mark in text[:_LINE_CHARACTERS]).strip()


def _by_number(path: Path) -> tuple[str, int]:
    digits: Iterator[str] = iter(re.findall(r"\d+", path.name))
    return re.sub(r"\d+", "", path.name), int(next(digits, "0"))
