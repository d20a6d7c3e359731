"""The parts of the load test that need neither server nor Locust."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.loadtest.errors import BadInput
from stillhouse.loadtest.prompts import DEFAULT_PROMPTS, load_prompts, shuffled
from stillhouse.loadtest.report import token_table, write_csv
from stillhouse.loadtest.samples import Sample
from stillhouse.loadtest.server_metrics import gauge_of, queue_of, read_page, version_size_bytes
from stillhouse.loadtest.tally import summarize
from stillhouse.loadtest.words import parse_duration_s, parse_rate, parse_share


def sample(start_s: float, ttft_s: float | None, e2e_s: float, tokens: int, outcome: str = "ok") -> Sample:
    last_s = None if ttft_s is None else e2e_s
    return Sample("m", start_s, start_s + e2e_s, ttft_s, last_s, tokens, True, outcome)


def test_the_formulas() -> None:
    (summary,) = summarize(
        [
            sample(100.0, 0.2, 1.2, 11),  # 100 ms between tokens
            sample(101.0, 0.4, 0.4, 1),  # one token: nothing between
            sample(102.0, 0.3, 2.0, 5, "cut"),  # 425 ms between those that came
            sample(103.0, None, 1.0, 0, "TimedOut"),
        ]
    )
    assert (summary.requests, summary.cut, summary.failures) == (2, 1, {"TimedOut": 1})
    assert summary.duration_s == pytest.approx(4.0)
    assert summary.tokens_per_s == pytest.approx(17 / 4)
    assert summary.tokens_per_answer == 6
    assert summary.itl.mean_ms == pytest.approx((100 + 425) / 2)
    assert summary.ttft.p50_ms == pytest.approx(300, rel=0.001)  # of those too whose answer the end cut off
    assert summary.e2e.p50_ms == pytest.approx(400, rel=0.001)


def test_samples_of_several_machines_go_together() -> None:
    samples = [sample(float(i), 0.1 * i, 1.0, 3) for i in range(1, 8)]
    assert summarize(samples) == summarize(reversed(samples))
    assert summarize([]) == []


def test_the_table_and_csv_hold_a_model_without_any_answer(tmp_path: Path) -> None:
    summaries = summarize([sample(0.0, None, 1.0, 0, "ConnectionFailed")])
    table = token_table(summaries)
    assert "m: failed: ConnectionFailed 1" in table
    write_csv(tmp_path / "out.csv", summaries)
    with (tmp_path / "out.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["failures"] == "1"
    assert row["ttft_p50_ms"] == ""


def test_prompt_files_hold_prompts_or_messages(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "Grüße"}, {"messages": [{"role": "user", "content": "x"}], "more": 1}]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert load_prompts(path) == [{"prompt": "Grüße"}, {"messages": [{"role": "user", "content": "x"}]}]
    assert load_prompts(None) == list(DEFAULT_PROMPTS)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "holds no prompt"),
        ("{}\n", "line 1: neither a prompt nor messages"),
        ('{"prompt": ""}\n', "line 1: neither"),
        ('{"prompt": "a", "messages": [1]}\n', "line 1: neither"),
        ('{"messages": ["hi"]}\n', "line 1: neither"),
        ('{"prompt": "a"}\n[1]\n', "line 2: neither"),
        ("prompt\n", "line 1: not JSON"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_line(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(BadInput, match=error) as caught:
        load_prompts(path)
    assert "every line is" in (caught.value.hint or "")


def test_a_missing_or_binary_prompt_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read the prompt file"):
        load_prompts(tmp_path / "nowhere.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not UTF-8"):
        load_prompts(tmp_path / "binary")


def test_the_seed_fixes_the_order_of_the_prompts() -> None:
    assert shuffled(DEFAULT_PROMPTS, 3) == shuffled(DEFAULT_PROMPTS, 3) != shuffled(DEFAULT_PROMPTS, 4)


def test_the_memory_gauge_is_read_by_its_model() -> None:
    page = (
        "# HELP stillhouse_process_resident_memory_bytes resident memory\n"
        'stillhouse_process_resident_memory_bytes{model_name="a",model_version="1"} 1.5e+08\n'
        'stillhouse_process_resident_memory_bytes{model_version="2",model_name="a"} 200000000 1700000000\n'
        'stillhouse_process_resident_memory_bytes{model_name="ab",model_version="1"} 9\n'
        'nv_cpu_memory_used_bytes{model_name="a"} 7\n'
    )
    assert gauge_of(page, "a") == 200_000_000
    assert gauge_of(page, "b") is None
    assert read_page("http://127.0.0.1:1/metrics") is None


def test_the_queue_time_is_what_came_between_two_looks() -> None:
    def page(count: int, below_10_ms: int, total_s: float) -> str:
        name = "vllm:request_queue_time_seconds"
        labels = 'model_name="a"'
        return (
            f'{name}_bucket{{le="0.01",{labels}}} {below_10_ms}\n{name}_bucket{{le="0.1",{labels}}} {count}\n'
            f'{name}_bucket{{le="+Inf",{labels}}} {count}\n'
            f"{name}_sum{{{labels}}} {total_s}\n{name}_count{{{labels}}} {count}\n"
        )

    before, after = queue_of(page(10, 10, 0.05), "a"), queue_of(page(20, 15, 0.55), "a")
    assert before is not None and after is not None
    queue = after.since(before)
    assert queue.mean_ms == pytest.approx(50)
    assert queue.percentile_ms(50) == pytest.approx(10)
    assert queue.percentile_ms(75) == pytest.approx(55)  # half way through the second bucket
    assert queue_of(page(1, 1, 1), "b") is None


def test_a_versions_size_is_the_sum_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.onnx").write_bytes(b"x" * 10)
    (tmp_path / "m" / "1" / "manifest.json").write_bytes(b"x" * 3)
    assert version_size_bytes(tmp_path, "m", "1") == 13
    assert version_size_bytes(tmp_path, "m", "2") is None


@pytest.mark.parametrize(("text", "seconds"), [("15", 15), ("15s", 15), ("2m", 120), ("1h", 3600)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "0s", "-1s", "1.5s", "1d"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(BadInput, match="a duration is"):
        parse_duration_s(text)


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("2.5", 0.025), ("0%", 0)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize(("text", "rate"), [("2", 2), ("2.5/s", 2.5), (0.0, 0)])
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "two", "-1", "inf", "nan/s", "2/min"])
def test_bad_rates(text: str) -> None:
    with pytest.raises(BadInput, match="a rate is"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["", "ten", "-3%", "%", "nan%", "inf"])
def test_bad_shares(text: str) -> None:
    with pytest.raises(BadInput, match="a share is"):
        parse_share(text)


def test_nan_is_none_in_json() -> None:
    (summary,) = summarize([sample(0.0, None, 1.0, 0, "TimedOut")])
    assert math.isnan(summary.ttft.p50_ms)
    assert summary.to_json()["ttft"]["p50_ms"] is None


def test_only_the_users_module_imports_locust() -> None:
    code = (
        "import sys, stillhouse.loadtest.commands, stillhouse.loadtest.compare, stillhouse.loadtest.run;"
        "print(sorted({'locust', 'gevent', 'grpc', 'tritonclient', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
