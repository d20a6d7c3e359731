"""A tiny version, a static server that can fail, and three boards on JetPack 6 as files in a folder.

The boards' paths, labels and forms are those of NVIDIA's developer guide for L4T 36 and of the kernel's drivers; the
values are such as tegrastats prints on these boards.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stillhouse.cli.main import run
from stillhouse.engine.directory import open_version, version_numbers
from stillhouse.engine.policy import live_versions, set_live_versions

_L4T = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 2025\n"
_NANO_MODES = (
    "# comment\n< PARAM TYPE=FILE NAME=CPU_ONLINE >\n< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_1 1\n"
    "< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=1 >\n"
)
_AGX_MODES = "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=3 NAME=MODE_50W >\n< PM_CONFIG DEFAULT=3 >\n"


@pytest.fixture
def orin_nano(tmp_path: Path) -> Path:
    """A developer kit in mode 25W (mode 1), stored; its CPU is hot enough to be throttled."""
    root = tmp_path / "board"
    _common(root, "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "p3768-0000+p3767-0005-super")
    _write(root, "var/lib/nvpmodel/status", "pmode:0001\n")
    _write(root, "etc/nvpmodel.conf", _NANO_MODES)
    _memory(root, total_kib=7_801_200, available_kib=5_242_880)
    _module_rails(root, currents_ma=(1000, 400, 200))
    _heat(root, {"cpu-thermal": 98500, "gpu-thermal": 71250, "tj-thermal": 98500}, off=("cv0-thermal",))
    _alerts(root, {"cpu-throttle-alert": 1, "gpu-throttle-alert": 0, "pwm-fan": 3})
    _clocks(root, clusters={"policy0": "0 1 2 3", "policy4": "4 5"}, cpu_khz=1344000, gpu_hz=918000000)
    return root


@pytest.fixture
def orin_nx(tmp_path: Path) -> Path:
    """An NX 16GB whose nvpmodel has stored nothing: it runs in its default mode. Clocks are pinned."""
    root = tmp_path / "board"
    _common(root, "NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "p3768-0000+p3767-0000")
    _write(root, "etc/nvpmodel.conf", _NANO_MODES)
    _memory(root, total_kib=15_656_000, available_kib=13_000_000)
    _module_rails(root, currents_ma=(1500, 600, 300))
    _heat(root, {"cpu-thermal": 50000, "gpu-thermal": 48000})
    _alerts(root, {"cpu-throttle-alert": 0})
    _clocks(root, clusters={"policy0": "0 1 2 3"}, cpu_khz=1984000, gpu_hz=918000000, pinned=True)
    _write(root, "var/lib/dpkg/status", "Package: foo\nVersion: 1\n\nPackage: nvidia-jetpack\nVersion: 6.2.1+b38\n")
    return root


@pytest.fixture
def agx_orin(tmp_path: Path) -> Path:
    """An AGX: two power sensors, no rail for the whole module, below the driver alone (hwmon does not list them)."""
    root = tmp_path / "board"
    _common(root, "NVIDIA Jetson AGX Orin Developer Kit", "p3737-0000+p3701-0005")
    _write(root, "var/lib/nvpmodel/status", "pmode:0003\n")
    _write(root, "etc/nvpmodel.conf", _AGX_MODES)
    _memory(root, total_kib=64_300_000, available_kib=60_000_000)
    driver = "sys/bus/i2c/drivers/ina3221"
    _sensor(root, f"{driver}/1-0040/hwmon/hwmon3", ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), 20000, (200, 100, 250))
    _sensor(root, f"{driver}/1-0041/hwmon/hwmon4", ("NC", "VDDQ_VDD2_1V8AO", "NC"), 5000, (0, 100, 0))
    _heat(root, {"cpu-thermal": 45000, "gpu-thermal": 44000, "tboard-thermal": -256000})
    _clocks(root, clusters={"policy0": "0 1 2 3"}, cpu_khz=2201600, gpu_hz=1300500000)
    return root


def _common(root: Path, model: str, board: str) -> None:
    _write(root, "proc/device-tree/model", f"{model}\0")
    _write(root, "proc/device-tree/compatible", f"nvidia,{board}\0nvidia,tegra234\0")
    _write(root, "etc/nv_tegra_release", _L4T)
    _write(root, "sys/class/hwmon/hwmon0/name", "soctherm_oc\n")
    for number, count in enumerate((0, 2, 5), 1):
        _write(root, f"sys/class/hwmon/hwmon0/oc{number}_event_cnt", f"{count}\n")


def _module_rails(root: Path, currents_ma: tuple[int, int, int]) -> None:
    labels = ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")
    _sensor(root, "sys/class/hwmon/hwmon1", labels, 5000, currents_ma)
    # The same sensor is also found below its driver.
    _sensor(root, "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1", labels, 5000, currents_ma)


def _sensor(
    root: Path, folder: str, labels: tuple[str, str, str], millivolts: int, milliamperes: tuple[int, int, int]
) -> None:
    _write(root, f"{folder}/name", "ina3221\n")
    for channel, (label, current) in enumerate(zip(labels, milliamperes, strict=True), 1):
        _write(root, f"{folder}/in{channel}_label", f"{label}\n")
        _write(root, f"{folder}/in{channel}_input", f"{millivolts}\n")
        _write(root, f"{folder}/curr{channel}_input", f"{current}\n")
        _write(root, f"{folder}/in{channel + 3}_input", "40\n")  # shunt voltages have no label
    _write(root, f"{folder}/in7_label", "sum of shunt voltages\n")
    _write(root, f"{folder}/in7_input", "120\n")
    _write(root, f"{folder}/curr4_input", "999\n")


def _heat(root: Path, zones: dict[str, int], off: tuple[str, ...] = ()) -> None:
    for number, (name, millidegrees) in enumerate([*zones.items(), *((name, None) for name in off)]):
        _write(root, f"sys/class/thermal/thermal_zone{number}/type", f"{name}\n")
        if millidegrees is not None:
            _write(root, f"sys/class/thermal/thermal_zone{number}/temp", f"{millidegrees}\n")


def _alerts(root: Path, states: dict[str, int]) -> None:
    for number, (name, state) in enumerate(states.items()):
        _write(root, f"sys/class/thermal/cooling_device{number}/type", f"{name}\n")
        _write(root, f"sys/class/thermal/cooling_device{number}/cur_state", f"{state}\n")


def _memory(root: Path, total_kib: int, available_kib: int) -> None:
    _write(root, "proc/meminfo", f"MemTotal:  {total_kib} kB\nMemFree:  100 kB\nMemAvailable:  {available_kib} kB\n")


def _clocks(root: Path, clusters: dict[str, str], cpu_khz: int, gpu_hz: int, *, pinned: bool = False) -> None:
    for policy, cores in clusters.items():
        folder = f"sys/devices/system/cpu/cpufreq/{policy}"
        _write(root, f"{folder}/related_cpus", f"{cores}\n")
        _range(root, folder, ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq"), cpu_khz, pinned)
    _range(root, "sys/class/devfreq/17000000.gpu", ("cur_freq", "min_freq", "max_freq"), gpu_hz, pinned)


def _range(root: Path, folder: str, files: tuple[str, str, str], now: int, pinned: bool) -> None:
    for file, value in zip(files, (now, now if pinned else now // 4, now), strict=True):
        _write(root, f"{folder}/{file}", f"{value}\n")


def _write(root: Path, file: str, text: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


@pytest.fixture(scope="session")
def tiny_repository(tiny_base: Path, kept_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with tiny-fp16 version 1, really built; its answers make no sense. Tests copy what they change."""
    assert kept_cache
    from stillhouse.build import pipeline
    from stillhouse.build.recipe import load_recipe

    folder = tmp_path_factory.mktemp("tiny-edge")
    recipe = folder / "recipe.toml"
    recipe.write_text(f'name = "tiny"\nbase = "{tiny_base}"\nadapters = []\nprecisions = ["fp16"]\n', "utf-8")
    failed = [
        each for each in pipeline.build(load_recipe(recipe), folder / "repository").results if each.status == "failed"
    ]
    assert not failed, failed
    return folder / "repository"


@pytest.fixture(scope="session")
def emulated(repo_root: Path) -> list[str]:
    """The beginning of a command line of the Python on the emulated aarch64: deploy/arm64.sh lays it out."""
    place, qemu = repo_root / ".arm64", shutil.which("qemu-aarch64-static")
    if qemu is None or not (place / "done").is_file():
        pytest.skip("the emulated machine is not laid out: make arm64")
    return [qemu, "-L", str(place / "sysroot"), str(place / "sysroot/usr/bin/python3.11")]


@pytest.fixture
def add_version(tiny_repository: Path) -> Callable[..., Path]:
    """Puts tiny-fp16 as version N into a repository and makes it the live one there; `change` may spoil its files."""

    def add(repository: Path, number: int, change: Callable[[Path], None] | None = None) -> Path:
        model = repository / "tiny-fp16"
        version = Path(shutil.copytree(tiny_repository / "tiny-fp16" / "1", model / str(number)))
        manifest = json.loads((version / "manifest.json").read_text("utf-8"))
        if change:
            change(version)
            for record in manifest["files"]:
                content = (version / record["path"]).read_bytes()
                record.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        (version / "manifest.json").write_text(json.dumps(manifest | {"version": number}), "utf-8")
        if not (model / "config.pbtxt").exists():
            (model / "config.pbtxt").write_text('backend: "stillhouse"\n', "utf-8")
        set_live_versions(model, [number], previous=number - 1 or None)
        return version

    return add


@dataclass
class FileServer:
    """A static server over a folder; what was asked of it, and how it may be made to fail."""

    url: str
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range
    breaks_after_bytes: int | None = None  # each connection, once, then no more
    knows_ranges: bool = True
    bytes_per_s: float | None = None


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[FileServer]:
    """Serves tmp_path/served, with ranges unless told otherwise."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = FileServer("")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            server.asked.append((self.path, wanted))
            file = Path(self.translate_path(self.path))
            if not file.is_file():
                super().do_GET()
                return
            content = file.read_bytes()
            begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.knows_ranges else 0
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            self._send(content[begin:])

        def _send(self, content: bytes) -> None:
            if server.breaks_after_bytes is not None and len(content) > server.breaks_after_bytes:
                content, server.breaks_after_bytes = content[: server.breaks_after_bytes], None
            step = 1 << 16
            for at in range(0, len(content), step):
                self.wfile.write(content[at : at + step])
                if server.bytes_per_s:
                    time.sleep(step / server.bytes_per_s)

        def log_message(self, *arguments: Any) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        server.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield server
        httpd.shutdown()
        thread.join()


@pytest.fixture
def served(tmp_path: Path, file_server: FileServer, add_version: Callable[..., Path]) -> FileServer:
    """A server on which version 2 of tiny-fp16 is live."""
    add_version(tmp_path / "served", 1)
    add_version(tmp_path / "served", 2)
    return file_server


@pytest.fixture
def device(tmp_path: Path, add_version: Callable[..., Path]) -> Path:
    """The device's repository, with version 1 of tiny-fp16 live."""
    add_version(tmp_path / "device", 1)
    return tmp_path / "device"


@pytest.fixture
def pull() -> Callable[..., int]:
    """`stillhouse edge pull` from (server, device, *options, model=); its exit status."""

    def call(server: FileServer, device: Path, *more: str, model: str = "tiny-fp16") -> int:
        return run(["edge", "pull", f"{server.url}/{model}", "--repository", str(device), *more])

    return call


@pytest.fixture
def truth() -> Callable[[Path], tuple[list[int], list[int]]]:
    """The versions of tiny-fp16 that are there and those that are live in a repository, each of these whole."""

    def look(repository: Path) -> tuple[list[int], list[int]]:
        model = repository / "tiny-fp16"
        live = live_versions(model)
        for number in live:
            open_version(model / str(number))
        return version_numbers(model), live

    return look
