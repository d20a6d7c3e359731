"""Reports as tables on stdout; what is unknown is a dash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stillhouse.edge.doctor import Check

_COLOURS = {"ok": "green", "note": "cyan", "fail": "red", "unknown": "yellow"}
_PIPE_COLUMNS = 200


def print_checks(checks: Sequence[Check]) -> None:
    """The doctor's findings, a line each, with what to do behind."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for column in ("state", "name", "found"):
        table.add_column(column, overflow="fold", no_wrap=column != "found")
    for check in checks:
        found = check.found + (f"\n→ {check.advice}" if check.advice else "")
        table.add_row(f"[{_COLOURS[check.state]}]{check.state}[/]", escape(check.name), escape(found))
    _print(table)


def print_bench(report: dict[str, Any]) -> None:
    """A line a shape; below it what the device is and how it was set."""
    device, model = report["device"], report["model"]
    mode = device["power_mode"]
    table = Table(box=None, pad_edge=False)
    columns = ("prompt", "answer", "prefill tok/s", "decode tok/s", "TTFT ms", "p50 ms", "p95 ms", "W", "J/token", "°C")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for cell in report["cells"]:
        hottest = max(cell["temperature_max_c"].values(), default=None)
        table.add_row(
            str(cell["prompt_tokens"]),
            str(cell["output_tokens"]),
            *(_spread(cell[name]) for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_ms")),
            *(_number(cell["between_tokens_ms"][name]) for name in ("p50", "p95")),
            _number(cell["power_watts"], 2),
            _number(cell["joules_per_token"], 3),
            _number(hottest),
        )
    _print(table)
    set_to = f"power mode {mode['name'] or mode['id']}" if mode else "power mode unknown"
    throttled = sorted({name for cell in report["cells"] for name in cell["throttled_by"]})
    for line in (
        f"{model['model']} version {model['version']}, ONNX Runtime {model['onnxruntime']} on {model['provider']},"
        f" threads: {model['threads'] or 'one a core'}",
        f"{device['module'] or device['model'] or 'unknown device'}, {set_to}, "
        + (", ".join(_clock(clock) for clock in device["clocks"]) or "clocks unknown"),
        f"peak memory {report['peak_memory_bytes'] / 1e6:.0f} MB",
        f"throttled by {', '.join(throttled)}" if throttled else "",
        *(_rails(report["cells"][-1]["rails_watts"]) if report["cells"] else ()),
    ):
        if line:
            print(line)


def _clock(clock: dict[str, Any]) -> str:
    return f"{clock['name']} ≤ {_number(clock['max_mhz'], 0)} MHz" + (" pinned" if clock["pinned"] else "")


def _rails(rails: dict[str, float | None]) -> list[str]:
    return [f"rails {', '.join(f'{name} {_number(watts, 2)} W' for name, watts in rails.items())}"] if rails else []


def _spread(values: dict[str, float]) -> str:
    return f"{values['mean']:.1f} ±{values['stdev']:.1f}"


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _print(table: Table) -> None:
    """A pipe has no width, and is not folded to one."""
    console = Console()
    Console(width=None if console.is_terminal else _PIPE_COLUMNS).print(table)
