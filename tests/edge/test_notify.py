"""What systemd is told, and the device's figures on /metrics."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from stillhouse.edge.device import Device
from stillhouse.edge.notify import notify, watchdog_s
from stillhouse.edge.telemetry import DeviceFigures


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    address = f"@stillhouse-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address.replace("@", "\0", 1))
        systemd.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert notify("READY=1", "STATUS=serving")
        assert systemd.recv(1000) == b"READY=1\nSTATUS=serving"


def test_without_systemd_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not notify("READY=1")


@pytest.mark.parametrize(
    ("usec", "whose", "seconds"),
    [
        ("30000000", None, 30.0),
        ("30000000", "ours", 30.0),
        ("30000000", "another's", None),
        (None, None, None),
        ("x", None, None),
    ],
)
def test_how_often_the_watchdog_wants_to_hear(
    monkeypatch: pytest.MonkeyPatch, usec: str | None, whose: str | None, seconds: float | None
) -> None:
    pid = {"ours": os.getpid(), "another's": 1}.get(whose) if whose else None
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    assert watchdog_s() == seconds


def page(root: Path) -> str:
    registry = CollectorRegistry()
    registry.register(DeviceFigures(Device(root)))
    return generate_latest(registry).decode()


def test_a_boards_power_heat_clocks_and_memory_are_figures(orin_nano: Path) -> None:
    text = page(orin_nano)
    assert 'stillhouse_edge_power_watts{rail="VDD_SOC"} 1.0' in text
    assert "stillhouse_edge_power_total_watts 5.0" in text
    assert 'stillhouse_edge_temperature_celsius{zone="gpu-thermal"} 71.25' in text
    assert 'stillhouse_edge_clock_hertz{clock="gpu"} 9.18e+08' in text
    assert "stillhouse_edge_throttled 1.0" in text
    assert "stillhouse_edge_over_current_events_total 7.0" in text
    assert "stillhouse_edge_memory_available_bytes 5.36870912e+09" in text


def test_what_is_unknown_is_left_out(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "power" not in text and "temperature" not in text and "throttled" not in text
    assert "stillhouse_edge_process_resident_memory_bytes" in text
