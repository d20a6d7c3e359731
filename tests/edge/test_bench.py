"""`stillhouse edge bench`: figures in a table and in JSON, with a board's power, heat and settings beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.cli.main import run
from stillhouse.edge.benching import percentile, spread
from stillhouse.edge.device import Device
from stillhouse.edge.power import Recorder, Recording, Sample


def test_json_tells_speed_energy_and_how_the_board_was_set(
    tiny_repository: Path, orin_nano: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(tiny_repository / "tiny-fp16" / "1")
    shape = ["--prompt-tokens", "16", "--output-tokens", "8", "--repeats", "3", "--threads", "1"]
    assert run(["edge", "bench", directory, *shape, "--root", str(orin_nano), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (cell,) = report["cells"]
    assert (cell["prompt_tokens"], cell["output_tokens"], cell["requests"]) == (16, 8, 3)
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_ms"):
        assert 0 < cell[name]["min"] <= cell[name]["mean"] <= cell[name]["max"]
    assert 0 < cell["between_tokens_ms"]["p50"] <= cell["between_tokens_ms"]["p95"]
    # The recorded board draws 5 W all the time.
    assert cell["power_watts"] == pytest.approx(5.0)
    assert cell["rails_watts"]["VDD_CPU_GPU_CV"] == pytest.approx(2.0)
    assert cell["joules_per_token"] == pytest.approx(cell["energy_joules"] / 24)
    assert cell["throttled_by"] == ["cpu-throttle-alert"]
    assert cell["temperature_max_c"]["tj-thermal"] == 98.5
    assert report["device"]["power_mode"] == {"id": 1, "name": "25W"}
    assert report["idle"]["power_watts"] == pytest.approx(5.0)
    assert report["peak_memory_bytes"] > 10**7
    assert (report["model"]["provider"], report["model"]["threads"]) == ("CPUExecutionProvider", 1)


def test_the_table_has_dashes_for_what_a_pc_does_not_tell(
    tiny_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(tiny_repository / "tiny-fp16" / "1")
    shape = ["--prompt-tokens", "8", "--output-tokens", "4", "--repeats", "1"]
    assert run(["edge", "bench", directory, *shape, "--root", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "decode tok/s" in table and "–" in table
    assert "power mode unknown" in table
    assert "on CPUExecutionProvider, threads: one a core" in table


def test_a_grid_longer_than_the_models_context_is_refused(
    tiny_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["edge", "bench", str(tiny_repository / "tiny-fp16" / "1"), "--grid"]) == 2
    assert "made for 2048 tokens" in capsys.readouterr().err


def test_energy_is_the_integral_of_power_and_unknown_where_a_moment_is() -> None:
    def at(second: float, watts: float | None) -> Sample:
        return Sample(second, {}, watts, {}, {}, [])

    assert Recording([at(0, 4.0), at(1, 6.0), at(3, 6.0)]).energy_joules == pytest.approx(5.0 + 12.0)
    assert Recording([at(0, 4.0), at(1, None), at(2, 4.0)]).energy_joules is None
    assert Recording([at(0, 4.0)]).energy_joules is None


def test_a_recording_follows_the_board(orin_nano: Path, wait_until: Callable[..., float]) -> None:
    with Recorder(Device(orin_nano), every_s=0.005) as recorder:
        samples = recorder.recording.samples
        current = orin_nano / "sys/class/hwmon/hwmon1/curr1_input"
        # Written beside and renamed, as sysfs never shows half a number.
        (orin_nano / "new").write_text("3000\n")
        (orin_nano / "new").rename(current)
        (orin_nano / "sys/class/hwmon/hwmon0/oc3_event_cnt").write_text("6\n")
        wait_until(lambda: samples[-1].total_watts == 15.0)
    summary = recorder.recording.summary()
    assert 5.0 < summary["power_watts"] < 15.0
    assert summary["over_current_events"] == 1


def test_spread_and_percentiles() -> None:
    assert spread([1.0, 3.0]) == {"mean": 2.0, "stdev": pytest.approx(2**0.5), "min": 1.0, "max": 3.0}
    assert spread([2.0])["stdev"] == 0.0
    assert percentile([float(number) for number in range(1, 102)], 95) == pytest.approx(96.0)
    assert percentile([], 50) is None
