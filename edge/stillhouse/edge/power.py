"""Power, heat and clocks while something runs: sampled on a thread, integrated to energy."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from stillhouse.edge.device import Device, Rail

_EVERY_S = 0.1
_WHOLE_MODULE = ("VDD_IN", "POM_5V_IN", "5V_IN")
# Measured behind VIN_SYS_5V0, which feeds it: in a sum it would count twice.
_PART_OF_ANOTHER = ("VDDQ_VDD2_1V8AO",)


@dataclass(slots=True)
class Sample:
    """The readings of one moment; None and missing names are unknown."""

    at_s: float
    rails_watts: dict[str, float | None]
    total_watts: float | None
    temperatures_c: dict[str, float]
    clocks_mhz: dict[str, float | None]
    alerts: list[str]


@dataclass(slots=True)
class Recording:
    """Samples of a stretch of time, in order; what can be said of it."""

    samples: list[Sample] = field(default_factory=list)
    over_current_events: int | None = None

    @property
    def energy_joules(self) -> float | None:
        """The integral of the total power (trapezia between samples); None where power is unknown at any moment."""
        return _integral([(sample.at_s, sample.total_watts) for sample in self.samples])

    def summary(self) -> dict[str, Any]:
        """Means of power by rail, the hottest of each zone, the range of each clock, and who throttled."""
        zones = sorted({zone for sample in self.samples for zone in sample.temperatures_c})
        clocks = sorted({clock for sample in self.samples for clock in sample.clocks_mhz})
        rails = list(dict.fromkeys(rail for sample in self.samples for rail in sample.rails_watts))
        return {
            "samples": len(self.samples),
            "power_watts": _mean([sample.total_watts for sample in self.samples]),
            "rails_watts": {rail: _mean([each.rails_watts.get(rail) for each in self.samples]) for rail in rails},
            "temperature_max_c": {
                zone: max(_known(each.temperatures_c.get(zone) for each in self.samples)) for zone in zones
            },
            "clocks_mhz": {clock: _range([each.clocks_mhz.get(clock) for each in self.samples]) for clock in clocks},
            "throttled_by": sorted({alert for sample in self.samples for alert in sample.alerts}),
            "over_current_events": self.over_current_events,
        }


class Recorder:
    """A context: records the device while it is open."""

    def __init__(self, device: Device, every_s: float = _EVERY_S) -> None:
        self._device = device
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stillhouse-power", daemon=True)
        self._events_before: int | None = None
        self.recording = Recording()

    def __enter__(self) -> Recorder:
        self._events_before = self._device.over_current_events()
        self.recording.samples.append(sample(self._device))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self.recording.samples.append(sample(self._device))
        events = self._device.over_current_events()
        if events is not None and self._events_before is not None:
            self.recording.over_current_events = events - self._events_before

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            self.recording.samples.append(sample(self._device))


def total_watts(rails: list[Rail]) -> tuple[float | None, list[str]]:
    """What the module draws, and the rails that it was read or added up from.

    Nano and NX measure their input (VDD_IN); an AGX does not: there it is the sum of the rails that feed no other.
    """
    whole = [rail for rail in rails if rail.name in _WHOLE_MODULE]
    parts = whole[:1] or [rail for rail in rails if rail.name not in _PART_OF_ANOTHER]
    watts = [rail.watts for rail in parts]
    known = [value for value in watts if value is not None]
    if not known or len(known) < len(watts):
        return None, []
    return sum(known), [rail.name for rail in parts]


def sample(device: Device) -> Sample:
    """The device now."""
    rails = device.rails()
    return Sample(
        at_s=time.perf_counter(),
        rails_watts={rail.name: rail.watts for rail in rails},
        total_watts=total_watts(rails)[0],
        temperatures_c=device.temperatures(),
        clocks_mhz={clock.name: clock.mhz for clock in device.clocks()},
        alerts=device.alerts(),
    )


def _integral(points: list[tuple[float, float | None]]) -> float | None:
    area = 0.0
    for (begin_s, left), (end_s, right) in itertools.pairwise(points):
        if left is None or right is None:
            return None
        area += (left + right) / 2 * (end_s - begin_s)
    return area if len(points) > 1 else None


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: list[float | None]) -> float | None:
    known = _known(values)
    return sum(known) / len(known) if known else None


def _range(values: list[float | None]) -> list[float] | None:
    known = _known(values)
    return [min(known), max(known)] if known else None
