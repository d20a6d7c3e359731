"""The device in Prometheus' form: `stillhouse_edge_*` on the gateway's /metrics. What is unknown is left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from stillhouse.edge.device import Device
from stillhouse.edge.power import total_watts

_PREFIX = "stillhouse_edge"


class DeviceFigures(Collector):
    """Reads the device whenever the page is asked for: some dozen small files, a few milliseconds."""

    def __init__(self, device: Device) -> None:
        self._device = device
        # Asked once: on a PC it takes a look through dpkg's megabytes.
        self._is_jetson = device.is_jetson

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        device = self._device
        memory = device.memory()
        yield from _gauge("memory_bytes", "All memory of the device", memory.total_bytes)
        yield from _gauge("memory_available_bytes", "Memory to be had without swapping", memory.available_bytes)
        yield from _gauge("process_resident_memory_bytes", "Memory of this process", _resident_bytes())
        rails = device.rails()
        yield from _gauges("power_watts", "Power by rail", "rail", {rail.name: rail.watts for rail in rails})
        yield from _gauge("power_total_watts", "Power of the whole module", total_watts(rails)[0])
        yield from _gauges("temperature_celsius", "Temperature by thermal zone", "zone", device.temperatures())
        clocks = {clock.name: None if clock.mhz is None else clock.mhz * 1e6 for clock in device.clocks()}
        yield from _gauges("clock_hertz", "Clocks of CPU, GPU and memory", "clock", clocks)
        if self._is_jetson:
            alerts = device.alerts()
            yield from _gauge("throttled", "Whether heat slows the device down: 0 or 1", float(bool(alerts)))
        if (events := device.over_current_events()) is not None:
            text = "How often current or voltage slowed the device down"
            yield CounterMetricFamily(f"{_PREFIX}_over_current_events", text, value=events)


def _gauge(name: str, text: str, value: float | None) -> Iterator[Metric]:
    if value is not None:
        yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=value)


def _gauges(name: str, text: str, label: str, values: dict[str, float | None] | dict[str, float]) -> Iterator[Metric]:
    family = GaugeMetricFamily(f"{_PREFIX}_{name}", text, labels=[label])
    for key, value in values.items():
        if value is not None:
            family.add_metric([key], value)
    if family.samples:
        yield family


def _resident_bytes() -> int | None:
    """Of this machine's own process, wherever the device's root is."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)
