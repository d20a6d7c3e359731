"""The open loop: what is planned is sent, and a server or a client that stands still cannot hide it."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stillhouse.loadtest.load import Load
from stillhouse.loadtest.page import stage_steps
from stillhouse.loadtest.run import LoadResult, run_locust

Locust = Callable[..., "subprocess.CompletedProcess[str]"]
HEADLESS = ("--headless", "--only-summary")
RATE = 20


def samples_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(result["sample_fields"], row, strict=True)) for row in result["samples"]]


def test_a_server_that_stalls_cannot_hide_it(server: Any, locust: Locust, tmp_path: Path) -> None:
    """Requests go on being sent while it stalls, and each waits as long as the server's own log says."""
    stalled: dict[str, float] = {}

    def stall() -> None:
        until_requests(server, RATE)
        with urllib.request.urlopen(f"{server.http_host}/stall?s=3", data=b"") as response:
            stalled.update(json.load(response))

    thread = threading.Thread(target=stall)
    thread.start()
    arguments = ("--host", server.openai_host, "--rate", str(RATE), "--arrivals", "constant", "--run-time", "9s")
    done = locust(*HEADLESS, *arguments, "--stop-timeout", "20", "--max-tokens", "3", "--result", "r.json")
    thread.join()
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    (summary,) = result["summaries"]
    log = server.log()
    assert summary["requests"] == len(log) > 5 * RATE
    assert summary["cut"] == 0, "the last ones were waited for"

    during = [entry for entry in log if stalled["begun_s"] < entry["came_s"] < stalled["until_s"]]
    assert len(during) == pytest.approx(3 * RATE, rel=0.3), "a closed loop would have sent next to nothing"
    longest_ms = 1000 * max(entry["first_s"] for entry in log)
    assert longest_ms > 2800
    # Never less than the server saw; more by what the client was late, which counts.
    assert longest_ms <= summary["ttft"]["max_ms"]
    late_on_the_server = sum(entry["first_s"] > 1 for entry in log)
    late_here = sum(sample["ttft_s"] > 1 for sample in samples_of(result))
    assert late_on_the_server == pytest.approx(2 * RATE, rel=0.3)
    # Those who were on the edge of a second on the server are beyond it here.
    assert late_on_the_server <= late_here <= late_on_the_server + RATE
    assert summary["ttft"]["p90_ms"] > 1000


@pytest.mark.slow
def test_a_master_and_two_workers_send_one_plan_and_their_histograms_are_one(
    server: Any, locust: Locust, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ("--host", server.grpc_host, "--rate", str(RATE), "--arrivals", "constant", "--run-time", "6s")
    more = ("--users", "2", "--spawn-rate", "2", "--stop-timeout", "10", "--max-tokens", "2")
    cluster = ("--master", "--master-bind-port", port, "--expect-workers", "2")
    with ThreadPoolExecutor() as pool:
        workers = [pool.submit(locust, "--worker", "--master-port", port) for _ in range(2)]
        done = locust(*HEADLESS, *arguments, *more, *cluster, "--slo", "ttft_p95<100ms", "--result", "r.json")
    assert [worker.result().returncode for worker in workers] == [0, 0]
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    (summary,) = result["summaries"]
    log = server.log()
    assert summary["requests"] == len(log) > RATE
    came_s = sorted(entry["came_s"] for entry in log)
    middle = came_s[10:-10]
    assert (middle[-1] - middle[0]) / (len(middle) - 1) == pytest.approx(1 / RATE, rel=0.1)
    assert len(result["client"]["processes"]) == 2
    # Nearest rank over the samples of both, and what the merged histograms say.
    ttft_ms = sorted(1000 * sample["ttft_s"] for sample in samples_of(result))
    for percent in (50, 95):
        rank = math.ceil(percent * len(ttft_ms) / 100)
        assert summary["ttft"][f"p{percent}_ms"] == pytest.approx(ttft_ms[rank - 1], rel=0.002)
    assert summary["verdicts"][0]["met"] is False and summary["good"] == 0
    assert done.stdout.count("tokens/s") == 1
    assert "ttft_p95<100ms MISSED" in done.stdout


@pytest.mark.slow
def test_a_plan_begins_when_all_dispatchers_are_there(server: Any, locust: Locust, tmp_path: Path) -> None:
    """The fourth comes three seconds after the first: the rate is whole from the first request on."""
    arguments = ("--host", server.openai_host, "--rate", "8", "--arrivals", "constant", "--run-time", "7s")
    more = ("--users", "4", "--spawn-rate", "1", "--stop-timeout", "10", "--max-tokens", "2")
    assert locust(*HEADLESS, *arguments, *more, "--result", "r.json").returncode == 0
    (summary,) = json.loads((tmp_path / "r.json").read_text())["summaries"]
    # Without waiting, the fourth would be 2.6 s late, or the eighth request would come after two seconds.
    assert summary["late"]["max_ms"] < 2000
    came_s = sorted(entry["came_s"] for entry in server.log())
    assert came_s[7] - came_s[0] == pytest.approx(7 / 8, abs=1.0)
    assert 8 < len(came_s) < 40


@pytest.mark.slow
def test_stages_are_whole_with_two_processes_and_end_the_test_by_themselves(server: Any, tmp_path: Path) -> None:
    shape = tmp_path / "shape.toml"
    levels = {1: 0, 1.5: 10, 2: 20}
    shape.write_text("".join(f"[[stage]]\nduration_s = {s}\nlevel = {level}\n" for s, level in levels.items()))
    load = Load(stages=str(shape), duration_s=4.5, arrivals="constant", processes=2, max_tokens=2)
    result = run_locust(server.openai_host, "support-int4", load)
    assert result.summary.requests == len(server.log()) == 55, "15 and 2 × 20; the first is due at 1 s"
    assert result.summary.cut == 0
    steps = [(step.label, step.summary.requests) for step in stage_steps(result)]
    assert steps == [("10 /s", 15), ("20 /s", 40)], "counted from the plan's begin, not from the first request"


@pytest.mark.slow
def test_a_trace_is_sent_at_its_times_with_its_lengths(server: Any, tmp_path: Path) -> None:
    trace = [{"prompt": f"p{n}", "at_s": at_s, "max_tokens": n + 1} for n, at_s in enumerate((0.0, 1.0, 3.0))]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in trace))
    result = run_locust(server.openai_host, "support-int4", Load(prompts=path, duration_s=4))
    log = sorted(server.log(), key=lambda entry: entry["came_s"])
    assert [entry["inputs"]["text_input"] for entry in log] == ["p0", "p1", "p2"]
    assert [entry["sent"] for entry in log] == [1, 2, 3]
    assert log[2]["came_s"] - log[0]["came_s"] == pytest.approx(3.0, abs=1.5)
    assert result.summary.requests == 3


def test_a_server_that_dies_ends_the_run_and_what_came_is_kept(server: Any) -> None:
    def kill() -> None:
        until_requests(server, 20)
        server.process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    result: LoadResult = run_locust(server.openai_host, "support-int4", Load(users=4, duration_s=40, max_tokens=2))
    killer.join()
    assert "stopped answering" in result.ended_early
    assert result.summary.requests >= 10
    assert set(result.summary.failures) <= {"ConnectionFailed", "StreamBroken"}
    assert result.summary.failures["ConnectionFailed"] < 200, "a dead server is not asked in a tight loop"
    assert result.summary.duration_s < 30


@pytest.mark.slow
def test_a_load_generator_that_cannot_keep_up_says_so(server: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import time, gevent\n"
        "from locust import events\n"
        "from stillhouse.loadtest.users import OpenAiUser\n"
        "class Mine(OpenAiUser):\n"
        "    pass\n"
        "def burn():\n"
        "    while True:\n"
        "        ends = time.perf_counter() + 0.2\n"
        "        while time.perf_counter() < ends: pass\n"
        "        gevent.sleep(0.001)\n"
        "events.test_start.add_listener(lambda **_: gevent.spawn(burn))\n"
    )
    command = [sys.executable, "-m", "locust", "-f", str(own), *HEADLESS, "--host", server.openai_host]
    command += ["--run-time", "4s", "--rate", "5"]
    done = subprocess.run([*command, "--result", "r.json"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["client"]["valid"] is False
    assert any("late at the 95th percentile" in problem for problem in result["client"]["problems"])
    assert "INVALID: the load generator could not keep up" in done.stdout
    # What the loop lost is in the figures: counted from the plan, they are above what the server saw.
    log = server.log()
    assert result["summaries"][0]["late"]["max_ms"] > 50
    assert result["summaries"][0]["ttft"]["max_ms"] > 1000 * max(entry.get("first_s", 0.0) for entry in log)


def until_requests(server: Any, count: int) -> None:
    ends = time.monotonic() + 60
    while len(server.log()) < count:
        assert time.monotonic() < ends, "too few requests came"
        time.sleep(0.2)
