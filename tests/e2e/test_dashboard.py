"""What the dashboard in deploy/ asks of Prometheus is what a running server tells."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.serve.launcher import Server
from stillhouse.serve.metrics import COUNTERS, GAUGES, HISTOGRAMS

pytestmark = pytest.mark.triton

SELECTED = re.compile(r"([a-z][a-z0-9_]*)(\{[^}]*\})")
GROUPED = re.compile(r"\bby \(([^)]*)\)")


def expressions(root: Path) -> list[str]:
    """Every query of the dashboard, that of its variable too."""
    dashboard = json.loads((root / "deploy" / "grafana-dashboard.json").read_text("utf-8"))
    (variable,) = (entry for entry in dashboard["templating"]["list"] if entry["name"] == "model_name")
    queried = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"])
    assert queried is not None
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [*panels, f'{queried[1]}{{{queried[2]}=""}}']


def test_every_metric_of_the_dashboard_is_on_the_page_with_its_labels(
    repo_root: Path,
    triton: Server,
    post: Callable[..., tuple[int, Any]],
    metric: Callable[..., float],
    wait_until: Callable[..., float],
) -> None:
    assert post("generate", {"text_input": "Hello", "max_tokens": 2})[0] == 200
    wait_until(lambda: metric(triton, "inter_token_latency_seconds_count") > 0)
    with urllib.request.urlopen(triton.metrics_url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    asked = set()
    for expression in expressions(repo_root):
        ((name, selection),) = SELECTED.findall(expression)
        labels = set(re.findall(r"(\w+)=", selection))
        for group in GROUPED.findall(expression):
            labels |= {label.strip() for label in group.split(",")}
        there = [line for line in lines if line.startswith(f"{name}{{")]
        assert there, f"{name} is not on the page"
        assert labels <= set(re.findall(r'(\w+)="', there[0])), f"{name} lacks a label of {labels}"
        asked.add(name)
    of_ours = {*GAUGES, *COUNTERS, *(f"{name}_bucket" for name in HISTOGRAMS)}
    assert {f"stillhouse_{name}" for name in of_ours} <= asked


def test_the_scrape_file_names_the_default_ports(repo_root: Path) -> None:
    scraped = set(re.findall(r'targets: \["localhost:(\d+)"\]', (repo_root / "deploy" / "prometheus.yml").read_text()))
    assert scraped == {"8002", "9000"}
