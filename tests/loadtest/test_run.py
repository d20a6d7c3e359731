"""Runs that stillhouse starts itself, and the commands over them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stillhouse.client import ConnectionFailed
from stillhouse.loadtest.commands import app
from stillhouse.loadtest.compare import Compared, compare_models, comparison_table, precision_of
from stillhouse.loadtest.errors import BadInput, RunFailed
from stillhouse.loadtest.load import Load, locust_arguments
from stillhouse.loadtest.run import LoadResult, merged, run_locust
from stillhouse.loadtest.samples import Sample
from stillhouse.loadtest.server_metrics import QueueTime
from stillhouse.loadtest.show import show
from stillhouse.loadtest.tally import Summary, summarize, tally_up


@pytest.mark.slow
def test_a_comparison_has_throughput_latencies_memory_and_size(server: Any, tmp_path: Path) -> None:
    version = tmp_path / "support-int4" / "2"
    version.mkdir(parents=True)
    (version / "model.onnx").write_bytes(bytes(120_000_000))
    told: list[str] = []
    compared = compare_models(
        server.grpc_host,
        load=Load(users=3, duration_s=2, max_tokens=5),
        metrics_url=f"{server.http_host}/metrics",
        repository=tmp_path,
        progress=told.append,
    )
    assert [one.precision for one in compared] == ["fp16", "int4"]
    assert told == ["support-fp16: 3 users, 2 s", "support-int4: 3 users, 2 s"]
    assert [one.load.memory_bytes for one in compared] == [1_500_000_000, 2_500_000_000]
    assert [one.size_bytes for one in compared] == [None, 120_000_000]
    for one in compared:
        assert one.load.summary.ttft.p50_ms == pytest.approx(200, abs=100)
        assert one.load.summary.tokens_per_answer == 5
        assert one.load.queue is not None
        assert one.load.queue.mean_ms == pytest.approx(4)
    header, rule, fp16, int4 = comparison_table(compared).splitlines()
    assert [cell.strip() for cell in header.split("|")] == [
        "precision",
        "tokens/s",
        "× fp16",
        "TTFT ms p50/p95",
        "between tokens ms p50/p95",
        "end to end ms p50/p95",
        "memory GB",
        "size GB",
    ]
    assert set(rule) <= {"-", "+"}
    assert fp16.split("|")[-2:] == ["      1.50 ", "       -"]
    assert int4.split("|")[-2:] == ["      2.50 ", "    0.12"]


def test_a_result_goes_through_json_and_back() -> None:
    value = json.loads(json.dumps(summary_without_answers().to_json(), allow_nan=False))
    again = Summary.from_json(value)
    assert again.failures == {"TimedOut": 1}
    assert math.isnan(again.e2e.p50_ms)
    table = comparison_table([])
    assert table.startswith("precision")
    assert LoadResult("m", 1, again, None).to_json()["memory_bytes"] is None


def test_a_run_without_a_single_answer_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunFailed, match=r"no request succeeded \(TimedOut 1\)"):
        show(LoadResult("m", 1, summary_without_answers(), None), None, False)
    assert "m: failed: TimedOut 1" in capsys.readouterr().out, "the table is printed all the same"


def test_the_table_is_printed_before_it_is_saved_and_a_name_that_will_not_do_is_known_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    nowhere = tmp_path / "file" / "name"
    with pytest.raises(OSError, match="file"):
        show(a_result(10), nowhere, False)
    assert "| answers |" in capsys.readouterr().out
    monkeypatch.setattr("stillhouse.loadtest.run.run_locust", lambda *_, **__: pytest.fail("it was run"))
    done = CliRunner().invoke(app, ["run", "localhost:1", "--save", str(nowhere)])
    assert isinstance(done.exception, BadInput) and f"cannot write {nowhere}" in str(done.exception)


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_an_interrupt_ends_a_run_whose_figures_are_shown(shared_server: Any, processes: str) -> None:
    words = ["run", shared_server.openai_host, "--users", "2", "--duration", "60s", "--processes", processes]
    # As a terminal does it: the whole group is told. A shell's background job would not hear it by default.
    ready = "import signal; signal.signal(2, signal.default_int_handler)"
    code = f"{ready}; from stillhouse.loadtest.commands import app; app()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    before = len(shared_server.log())
    with subprocess.Popen([sys.executable, "-c", code, *words], text=True, start_new_session=True, **pipes) as command:
        ends = time.monotonic() + 30
        while len(shared_server.log()) < before + 6 and command.poll() is None and time.monotonic() < ends:
            time.sleep(0.1)
        os.killpg(command.pid, signal.SIGINT)
        out, error = command.communicate(timeout=30)
    assert command.returncode == 130, error
    header, _, row = out.splitlines()[:3]
    assert header.startswith("model") and int(row.split("|")[1]) >= 2


def a_result(
    tokens: int, *, problems: tuple[str, ...] = (), queue: QueueTime | None = None, **details: Any
) -> LoadResult:
    """Ten answers, one a second, of so many tokens each."""
    samples = [Sample("m", float(n), n + 1.0, 0.1, 1.0, tokens, True, "ok") for n in range(10)]
    (tally,) = tally_up(samples).values()
    details = {"tally": tally.to_json(), "client": {"problems": list(problems)}, **details}
    return LoadResult("m", 1, tally.summary(), tokens * 10**8, queue, details=details)


def test_several_rounds_are_merged_to_one_that_is_no_more_valid_than_they_are() -> None:
    queues = [QueueTime(1.0, 10, {0.1: 6.0, math.inf: 10.0}), None, QueueTime(3.0, 10, {0.1: 2.0, math.inf: 10.0})]
    rounds = [
        a_result(n, problems=("late",) if n == 5 else (), queue=q) for n, q in zip((5, 6, 10), queues, strict=True)
    ]
    whole = merged(rounds)
    assert whole.summary.requests == 30
    assert whole.summary.duration_s == pytest.approx(30), "of the runs alone, not of what was between them"
    assert whole.summary.tokens_per_s == pytest.approx(7)
    assert whole.memory_bytes == 10**9
    assert whole.queue == QueueTime(4.0, 20, {0.1: 8.0, math.inf: 20.0})
    assert whole.problems == ["late"]
    assert whole.to_json(whole=False)["client"] == {"valid": False, "problems": ["late"]}


def test_rounds_take_turns_and_give_a_spread_and_the_ratio_within_a_round(
    shared_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = {"support-fp16": iter((4, 8, 6)), "support-int4": iter((8, 8, 9))}
    asked: list[tuple[str, int]] = []

    def run(url: str, model: str, load: Load, **_: Any) -> LoadResult:  # noqa: ARG001
        asked.append((model, load.seed))
        return a_result(next(tokens[model]))

    monkeypatch.setattr("stillhouse.loadtest.compare.run_locust", run)
    compared = compare_models(shared_server.grpc_host, load=Load(seed=3), rounds=3)
    assert asked == [(model, seed) for seed in (3, 4, 5) for model in tokens]
    header, _, fp16, int4 = ([c.strip() for c in line.split("|")] for line in comparison_table(compared).splitlines())
    assert header[:4] == ["precision", "tokens/s", "±", "× fp16"]
    assert fp16[:4] == ["fp16", "6.0", "2.0", "1.00"]
    assert int4[:4] == ["int4", "8.0", "0.5", "1.50"], "the median of 2, 1 and 1.5; not 8 / 6"


@pytest.mark.parametrize(
    ("cut", "error"), [({"ended_early": "it died"}, RunFailed), ({"interrupted": True}, KeyboardInterrupt)]
)
def test_a_comparison_that_is_cut_short_leaves_its_rounds(
    shared_server: Any, monkeypatch: pytest.MonkeyPatch, cut: dict[str, Any], error: type[BaseException]
) -> None:
    came = iter((a_result(5), a_result(6, **cut)))
    monkeypatch.setattr("stillhouse.loadtest.compare.run_locust", lambda *_, **__: next(came))
    compared: list[Compared] = []
    with pytest.raises(error):
        compare_models(shared_server.grpc_host, rounds=2, compared=compared)
    assert [one.tokens_per_s for one in compared] == [[pytest.approx(5)], [pytest.approx(6)]]
    assert comparison_table(compared).endswith("int4: cut short")


def summary_without_answers() -> Summary:
    (summary,) = summarize([Sample("m", 0.0, 1.0, None, None, 0, False, "TimedOut")])
    return summary


def test_what_cannot_be_tested_is_told_by_the_parent_too(server: Any) -> None:
    with pytest.raises(BadInput, match="no model 'nobody'") as caught:
        run_locust(server.grpc_host, "nobody", Load(duration_s=1))
    assert "support-int4" in (caught.value.hint or "")
    with pytest.raises(ConnectionFailed, match="cannot reach localhost:1"):
        run_locust("localhost:1", "", Load(duration_s=1))
    with pytest.raises(BadInput, match="no model 'nobody'"):
        compare_models(server.grpc_host, ["support-int4", "nobody"], Load(duration_s=1))


def test_the_current_folders_locust_configuration_does_not_matter(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locust.conf").write_text("users = 9\nmodel = nobody\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCUST_USERS", "9")
    result = run_locust(server.http_host, "support-fp16", Load(users=2, duration_s=1))
    assert result.users == 2
    assert result.summary.cut == 2


@pytest.mark.slow
def test_the_command_prints_the_table_alone_on_stdout(server: Any) -> None:
    command = [sys.executable, "-c", "from stillhouse.loadtest.commands import app; app()"]
    arguments = ["compare", server.grpc_host, "--models", "support-int4", "--duration", "1s", "--users", "2"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("precision")
    assert len(done.stdout.splitlines()) == 3
    assert "support-int4: 2 users, 1 s" in done.stderr
    assert "ignore_eos" in server.log()[-1]["inputs"]["sampling_parameters"]
    arguments += ["--json", "--no-ignore-eos"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[0]["summary"]["requests"] > 0
    assert "ignore_eos" not in server.log()[-1]["inputs"]["sampling_parameters"], "strict servers refuse it"


@pytest.mark.slow
def test_an_edge_servers_memory_is_read_with_the_key_which_nobody_else_gets(
    guarded_server: Any, server: Any, http_answers: Callable[..., str]
) -> None:
    load = Load(users=1, duration_s=1, max_tokens=2)
    own = run_locust(guarded_server.openai_host, load=load, api_key="secret")
    assert (own.memory_bytes, own.hint) == (3_500_000_000, "")
    elsewhere = f"{guarded_server.openai_host}/metrics"
    assert run_locust(server.openai_host, load=load, metrics_url=elsewhere, api_key="secret").memory_bytes is None
    page = http_answers(b"HTTP/1.0 200 OK\r\n\r\nstillhouse_gateway_requests_in_flight 0.0\n")
    behind = run_locust(server.openai_host, load=load, metrics_url=page)
    assert behind.memory_bytes is None
    assert "--metrics-url http://127.0.0.1:8002/metrics" in behind.hint, "there is Triton's own page"


def test_stages_of_users_are_asked_over_the_wished_protocol(tmp_path: Path) -> None:
    (tmp_path / "users.toml").write_text('unit = "users"\n[[stage]]\nduration_s = 1\nlevel = 2\n')
    load = Load(stages=str(tmp_path / "users.toml"), protocol="openai")
    assert locust_arguments("http://h/v1", "m", load, tmp_path)[-1] == "OpenAiUser"


@pytest.mark.parametrize(
    ("model", "precision"), [("support-int4", "int4"), ("my-model", "my-model"), ("a-fp16", "fp16"), ("int8", "int8")]
)
def test_the_precision_is_the_names_ending(model: str, precision: str) -> None:
    assert precision_of(model) == precision
