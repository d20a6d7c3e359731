"""Some hundred hostile requests at all doors: each gets a sound answer or a clear error, and nothing is left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.gateway import body
from stillhouse.serve.launcher import Server
from stillhouse.serve.openai import running_gateway

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import hostile
from attacks.generator import Generator
from attacks.wire import Targets

pytestmark = pytest.mark.triton


def test_hostile_requests_get_clear_errors_and_change_nothing(
    triton: Server,
    support_repository: Path,
    metric: Callable[..., float],
    wait_until: Callable[..., float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(body, "_PIECE_TIMEOUT_S", 2.0)  # some bodies never come whole
    generator = Generator(1, "support-int4")
    with running_gateway(triton, support_repository) as gateway:
        targets = Targets(triton.grpc_url, triton.http_url, gateway.url)
        expected = hostile.control_answers(generator, targets)
        seen = hostile.attack_all(generator, range(200), targets, expected)
    assert seen.bad == []
    assert seen.changed == []
    assert (seen.count("answer") > 15, seen.count("refusal") > 100) == (True, True)
    wait_until(lambda: metric(triton, "num_requests_running") == metric(triton, "num_requests_waiting") == 0)
