"""The memory benchmark: its shapes, its line through two depths, and whose memory it watches."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stillhouse.build.worker import STAGES


@pytest.fixture(scope="module")
def memory(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("memory")


def run_of(layers: int, peaks: dict[str, float]) -> dict[str, Any]:
    stages = [
        {"name": name, "rss": peak * 2**30, "anonymous": peak * 2**29, "seconds": 60 * peak}
        for name, peak in peaks.items()
    ]
    machine = {"processor": "a processor", "cores": 2}
    return {"layers": layers, "measured": "2026-01-01", "machine": machine, "stages": stages}


def test_the_shapes_have_as_many_parameters_as_the_models_are_named_after(memory: ModuleType) -> None:
    assert memory.parameters(memory.SHAPE) == pytest.approx(1.777e9, rel=1e-3)
    assert memory.parameters(memory.SHAPE_7B) == pytest.approx(7.615e9, rel=1e-3)


def test_what_was_not_measured_at_the_full_depth_lies_on_the_line_through_two_depths(memory: ModuleType) -> None:
    runs = [
        run_of(2, {"merge": 3.0, "make int4 by auto": 2.0}),
        run_of(15, {"make int4 by auto": 3.0, "calibrate": 1.0}),
        run_of(28, {"merge": 9.0, "make int4 by k_quant": 1.5}),
    ]
    stages = {title: (stage["rss"] / 2**30, measured) for title, (stage, measured) in memory.by_stage(runs).items()}
    assert stages == {"merge": (9.0, True), "make int4 by k_quant": (1.5, True), "make int4 by auto": (4.0, False)}
    table = memory.markdown(runs)
    assert "| merge | 9.0 | 4.5 | 9.0 |" in table
    assert "| make int4 by auto (computed) | 4.0 | 2.0 | – |" in table
    assert "The most: 9.0 GiB, of 12 that the 1.5B may take." in table


def test_the_anonymous_memory_of_a_stages_process_is_seen(memory: ModuleType, wait_until: Callable[..., float]) -> None:
    held = "held = bytearray(b'x' * 60_000_000); print(flush=True); input()"
    # The watch goes by the command line, and by whose child it is.
    command = [sys.executable, "-c", held, "stillhouse.build.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with memory.Watch(os.getpid()) as watch:
            wait_until(lambda: watch.peaks.get(child.pid, 0) > 60_000_000)
            child.communicate(b"\n")
    assert not watch.is_alive()
    assert watch.peaks[child.pid] < 200_000_000


def test_the_stages_are_those_of_a_build_with_the_arguments_that_they_take(
    memory: ModuleType, tiny_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base, tmp_path / "merge")
    titles = []
    for title, stage, arguments in memory.stages(tmp_path, ["fp16", "int8", "int4"], "auto"):
        module, _, function = STAGES[stage].partition(":")
        inspect.signature(getattr(importlib.import_module(module), function)).bind(lambda _: None, **arguments)
        titles.append(title)
    own = ["fp16", "verify fp16", "int8 by rtn", "verify int8", "calibrate", "int4 by auto", "verify int4"]
    expected = [f"make {title}" if title[0] in "fi" else title for title in own]
    assert titles == ["merge", "export fp32", "reference", *expected]
