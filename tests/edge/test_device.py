"""What a board says of itself, read from recorded layouts of an Orin Nano, an NX and an AGX."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.edge.device import Device, PowerMode, Rail
from stillhouse.edge.power import total_watts


def test_an_orin_nano_is_read_whole(orin_nano: Path) -> None:
    device = Device(orin_nano)
    assert device.is_jetson
    assert device.module() == "Jetson Orin Nano 8GB (developer kit)"
    assert device.model() == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert (device.l4t(), device.jetpack(), device.architecture()) == ("36.4.3", "6.2", 87)
    assert str(device.power_mode()) == "25W (mode 1)"
    assert device.memory().available_bytes == 5_242_880 * 1024
    assert device.temperatures() == {"cpu-thermal": 98.5, "gpu-thermal": 71.25, "tj-thermal": 98.5}
    assert device.alerts() == ["cpu-throttle-alert"]
    assert device.over_current_events() == 7
    assert [(clock.name, clock.mhz, clock.pinned) for clock in device.clocks()] == [
        ("cpu0-3", 1344.0, False),
        ("cpu4-5", 1344.0, False),
        ("gpu", 918.0, False),
    ]


def test_a_board_is_read_below_a_relative_root_too(orin_nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Device(orin_nano)
    monkeypatch.chdir(orin_nano.parent)
    device = Device(Path(orin_nano.name))
    assert device.clocks() and device.clocks() == whole.clocks()
    assert (device.rails(), device.temperatures()) == (whole.rails(), whole.temperatures())


@pytest.mark.parametrize(("package", "release"), [("36.4.3-20250107174145", "36.4.3"), ("unknown", None)])
def test_the_release_is_that_of_a_package_where_no_file_tells(
    tmp_path: Path, package: str, release: str | None
) -> None:
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(f"Package: nvidia-l4t-core\nVersion: {package}\n")
    device = Device(tmp_path)
    assert device.l4t() == release
    assert device.jetpack() == (release and "6.2")


def test_the_input_rail_is_the_total_where_there_is_one(orin_nano: Path) -> None:
    rails = Device(orin_nano).rails()
    assert [rail.name for rail in rails] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]
    assert total_watts(rails) == (5.0, ["VDD_IN"])


def test_an_agx_adds_up_the_rails_that_feed_no_other(agx_orin: Path) -> None:
    device = Device(agx_orin)
    rails = device.rails()
    assert [rail.name for rail in rails] == ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"]
    watts, of = total_watts(rails)
    assert of == ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"]
    assert watts == pytest.approx(20 * 0.55)
    assert device.module() == "Jetson AGX Orin 64GB"
    assert str(device.power_mode()) == "MODE_50W (mode 3)"
    assert "tboard-thermal" not in device.temperatures()


def test_an_nx_in_its_default_mode_with_jetpack_as_a_package(orin_nx: Path) -> None:
    device = Device(orin_nx)
    assert device.module() == "Jetson Orin NX 16GB"
    assert device.jetpack() == "6.2.1"
    assert device.power_mode() == PowerMode(1, "25W")
    assert all(clock.pinned for clock in device.clocks())
    assert device.alerts() == []


def test_of_an_empty_root_everything_is_unknown(tmp_path: Path) -> None:
    device = Device(tmp_path)
    assert not device.is_jetson
    readings = (device.model(), device.module(), device.l4t(), device.jetpack(), device.power_mode())
    assert readings == (None,) * 5
    assert (device.rails(), device.temperatures(), device.clocks(), device.alerts()) == ([], {}, [], [])
    assert device.memory().available_bytes is None
    assert device.over_current_events() is None
    assert total_watts([]) == (None, [])


@pytest.mark.parametrize("odd", [b"", b"\xff\xfe\x00", b"N/A\n", b"-\n", b"99999999999999999999999\n"])
def test_odd_contents_are_unknown_and_no_crash(orin_nano: Path, odd: bytes) -> None:
    for file in list(orin_nano.rglob("*")):
        if file.is_file():
            file.write_bytes(odd)
    device = Device(orin_nano)
    assert device.memory().total_bytes is None
    assert device.temperatures() == {}
    assert device.power_mode() is None
    assert device.l4t() is None
    assert all(rail.watts is None for rail in device.rails())
    assert all(clock.mhz is None for clock in device.clocks())
    assert device.over_current_events() is None


def test_a_folder_in_a_files_place_is_unknown_and_no_crash(orin_nano: Path) -> None:
    for file in list(orin_nano.rglob("*")):
        if file.is_file():
            file.unlink()
            file.mkdir()
    device = Device(orin_nano)
    assert not device.is_jetson
    assert (device.rails(), device.temperatures(), device.alerts()) == ([], {}, [])


def test_a_rail_that_cannot_be_read_makes_the_total_unknown_not_smaller() -> None:
    rails = [Rail("VDD_GPU_SOC", 20.0, 0.5), Rail("VDD_CPU_CV", 20.0, None)]
    assert total_watts(rails) == (None, [])
