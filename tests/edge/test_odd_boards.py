"""Boards that nobody here has seen: whatever lies below the root, each reading is a value or unknown, and no crash."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from stillhouse.cli.main import run
from stillhouse.edge import doctor, tables
from stillhouse.edge.benching import describe_device
from stillhouse.edge.device import Device
from stillhouse.edge.power import Recording, sample
from stillhouse.edge.telemetry import DeviceFigures

Fate = Callable[[Path], object]


def _holds(content: bytes) -> Fate:
    return lambda file: file.write_bytes(content)


def _leads_to(target: str) -> Fate:
    def link(file: Path) -> None:
        file.unlink()
        file.symlink_to(target)

    return link


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _pipe(file: Path) -> None:
    """Opening one waits for ever, unless one says not to."""
    file.unlink()
    os.mkfifo(file)


FATES: st.SearchStrategy[Fate] = st.one_of(
    st.just(Path.unlink),
    st.just(_folder),
    st.just(_pipe),
    # Nowhere, in a circle, to what cannot be read, to what does not end.
    st.sampled_from(["nowhere", "/proc/self/mem", "/dev/zero", ".."]).map(_leads_to),
    st.builds(lambda: lambda file: _leads_to(file.name)(file)),
    st.binary(max_size=40).map(_holds),
    st.text(max_size=40).map(lambda text: _holds(text.encode("utf-8", "surrogatepass"))),
    st.integers(-(10**30), 10**30).map(lambda number: _holds(f"{number}\n".encode())),
    st.sampled_from(
        [b"\x1b[31m1\n", b"nan", b"0x10", b"1e9", b"12 34", "٣٤".encode(), b"9" * 6000, b"\0" * 50, b"a\n" * 5000]
    ).map(_holds),
    # What has the right form, and senseless values.
    st.sampled_from(
        [
            b"# R999999999 (release), REVISION: 99999999999999999999.1\n",
            b"pmode:999999999\n",
            b"MemTotal: 999999999999999999 kB\nMemAvailable: -3 kB\n",
            b"< POWER_MODEL ID=1 NAME=\x1b[2J\xff >\n< PM_CONFIG DEFAULT=1 >\n",
            b"Package: nvidia-jetpack\nVersion: \xff\x1b\n\nPackage: nvidia-l4t-core\nVersion: 99999999999\n",
        ]
    ).map(_holds),
)
ODD_NAMES = (
    "sys/devices/system/cpu/cpufreq/policy\udcff\x1b/related_cpus",
    "sys/class/thermal/thermal_zone\udcff/type",
    "sys/class/hwmon/hwmon/name",
    "sys/class/hwmon/hwmon1/in_label",
    "sys/class/devfreq/\udcffgpu/cur_freq",
)


def every_reading(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All that doctor, bench and /metrics read of a board, written as they write it."""
    monkeypatch.setattr(doctor, "_runtime", lambda _: iter(()))  # this machine's own, and slow
    device = Device(root)
    found = {"doctor": doctor.report(device), "bench": describe_device(device)}
    recording = Recording([sample(device), sample(device)])
    found |= {"summary": recording.summary(), "energy": recording.energy_joules}
    tables.print_checks(doctor.examine(device))
    registry = CollectorRegistry()
    registry.register(DeviceFigures(device))
    generate_latest(registry)
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode("utf-8")
    return found


@pytest.mark.parametrize("board", ["orin_nano", "orin_nx", "agx_orin"])
def test_no_reading_crashes_whatever_a_file_holds_or_is(
    board: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole: Path = request.getfixturevalue(board)
    files = sorted(str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file())

    @settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from([*files, *ODD_NAMES]), FATES, min_size=1, max_size=len(files)))
    def holds(fates: dict[str, Fate]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(shutil.copytree(whole, Path(folder, "board")))
            for name, fate in fates.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).touch()
                fate(root / name)
            every_reading(root, monkeypatch)
        said = capsys.readouterr().out
        assert all(mark.isprintable() or mark == "\n" for mark in said), "a board does not move a terminal's cursor"

    holds()


def test_what_may_not_be_read_is_unknown(
    orin_nano: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied_below(open_it: Callable[..., Any]) -> Callable[..., Any]:
        def denied(file: str | Path, *arguments: Any, **named: Any) -> Any:
            if Path(file).is_relative_to(orin_nano):  # what else runs in this process may read what it likes
                raise PermissionError(13, "Permission denied")
            return open_it(file, *arguments, **named)

        return denied

    monkeypatch.setattr(Path, "open", denied_below(Path.open))
    monkeypatch.setattr(os, "open", denied_below(os.open))
    found = every_reading(orin_nano, monkeypatch)
    monkeypatch.undo()
    assert found["doctor"]["memory_bytes"] is None and found["doctor"]["model"] is None
    assert found["summary"]["power_watts"] is None and found["energy"] is None
    assert "unknown" in capsys.readouterr().out


def test_bench_goes_on_on_a_board_of_nonsense(
    orin_nano: Path, tiny_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, file in enumerate(sorted(file for file in orin_nano.rglob("*") if file.is_file())):
        file.write_bytes((b"", b"\xff\xfe", b"nonsense", b"9" * 40, b"-1")[number % 5])
    shape = ["--prompt-tokens", "8", "--output-tokens", "4", "--repeats", "1", "--root", str(orin_nano)]
    assert run(["edge", "bench", str(tiny_repository / "tiny-fp16" / "1"), *shape, "--json"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert cell["decode_tokens_per_s"]["mean"] > 0
    assert cell["joules_per_token"] is None or math.isfinite(cell["joules_per_token"])
