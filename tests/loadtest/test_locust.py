"""Plain Locust with the repository's locustfile, against a server whose delays are known."""

from __future__ import annotations

import csv
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Locust = Callable[..., "subprocess.CompletedProcess[str]"]
HEADLESS = ("--headless", "--only-summary")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def near(value: float, *, rel: float, abs: float = 0) -> Any:  # noqa: A002
    """As pytest.approx; five times as wide while more processes want to run than there are processors."""
    width = 5 if os.getloadavg()[0] > (os.cpu_count() or 1) else 1
    return pytest.approx(value, rel=rel * width, abs=abs * width)


def server_side_ms(log: list[dict[str, Any]]) -> dict[str, float]:
    """The medians as the server itself saw them, of the answers that it finished."""
    done = [entry for entry in log if entry["ended"] == "done"]
    return {
        "ttft": 1000 * statistics.median(e["first_s"] for e in done),
        "itl": 1000 * statistics.median((e["last_s"] - e["first_s"]) / max(e["sent"] - 1, 1) for e in done),
        "e2e": 1000 * statistics.median(e["last_s"] for e in done),
    }


def write_prompts(path: Path, *prompts: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps({"prompt": json.dumps(prompt)}) + "\n" for prompt in prompts))
    return str(path)


@pytest.mark.parametrize("over", ["grpc", "http", "openai"])
def test_the_figures_are_the_servers_known_delays(server: Any, locust: Locust, tmp_path: Path, over: str) -> None:
    host = getattr(server, f"{over}_host")
    users = 8
    # Answers take 0.4 s and begin together: 3 s end in the middle of one, not between two.
    arguments = ("--host", host, "--users", str(users), "--spawn-rate", "8", "--run-time", "3s")
    done = locust(
        *HEADLESS, *arguments, "--csv", "out", "--json-file", "stats", "--result", "result.json", "--html", "out.html"
    )
    assert done.returncode == 0, done.stderr

    (summary,) = json.loads((tmp_path / "result.json").read_text())["summaries"]
    assert summary["model"] == "support-int4"  # by default the repository's int4
    truth = server_side_ms(server.log())
    assert truth["ttft"] >= 200 and truth["itl"] >= 19.9 and truth["e2e"] >= 400
    assert summary["ttft"]["p50_ms"] == near(truth["ttft"], rel=0.1, abs=25)
    assert summary["itl"]["p50_ms"] == near(truth["itl"], rel=0.1)
    assert summary["e2e"]["p50_ms"] == near(truth["e2e"], rel=0.1, abs=25)
    assert summary["tokens_per_answer"] == 11
    assert summary["counted_by_server"] is True
    # Eight users who don't block one another: 8 × 11 tokens in the time of one answer.
    assert summary["tokens_per_s"] == near(users * 11 / summary["e2e"]["mean_ms"] * 1000, rel=0.2)
    assert summary["failures"] == {}
    # The users who were asking when the test ended: nobody is missing, and what reached them counts.
    cancelled = sum(entry["ended"] == "cancelled" for entry in server.log())
    assert cancelled <= summary["cut"] <= users  # some may have been between two requests
    assert len(server.log()) <= summary["requests"] + summary["cut"]
    sent = sum(entry["sent"] for entry in server.log())
    assert 11 * summary["requests"] <= summary["tokens"] <= sent  # the server sends on until it sees the end

    # Locust's own figures, which it writes as JSON when all is over; its CSV may be a second old by then.
    stats = {(entry["method"], entry["name"]): entry for entry in json.loads((tmp_path / "stats.json").read_text())}
    assert set(stats) == {(kind, "support-int4") for kind in ("TTFT", "ITL", "E2E")}
    for (kind, _), entry in stats.items():
        assert entry["num_requests"] == summary["requests"]
        mean_ms = entry["total_response_time"] / entry["num_requests"]
        assert mean_ms == near(summary[kind.lower()]["mean_ms"], rel=0.1)
    table = {(row["Type"], row["Name"]) for row in read_csv(tmp_path / "out_stats.csv")}
    assert table == {*stats, ("", "Aggregated")}

    page = (tmp_path / "out.html").read_text("utf-8")
    assert all(f'"method": "{kind}"' in page for kind, _ in stats)

    (tokens,) = read_csv(tmp_path / "out_tokens.csv")
    assert float(tokens["tokens_per_s"]) == pytest.approx(summary["tokens_per_s"], abs=0.01)
    assert "tokens/s" in done.stdout
    assert "support-int4" in done.stdout


@pytest.mark.slow
def test_fifty_users_over_grpc_ask_side_by_side(server: Any, locust: Locust, tmp_path: Path) -> None:
    """One stalls for ever, the others' first tokens come in time: a user never blocks the others."""
    slow = {"stall_after": 1}
    prompts = write_prompts(tmp_path / "prompts.jsonl", slow, *[{"tokens": 5}] * 9)
    arguments = ("--host", server.grpc_host, "--users", "50", "--spawn-rate", "50", "--run-time", "6s")
    done = locust(*HEADLESS, *arguments, "--prompts", prompts, "--result", "result.json")
    assert done.returncode == 0, done.stderr
    (summary,) = json.loads((tmp_path / "result.json").read_text())["summaries"]
    log = server.log()
    assert summary["requests"] > 0
    assert summary["ttft"]["p50_ms"] == near(server_side_ms(log)["ttft"], rel=0.15, abs=50)
    # Whoever came to the stalling prompt stays there until the end, and is then cancelled on the server.
    stalled = [entry for entry in log if "stall_after" in entry["inputs"]["text_input"]]
    assert stalled
    assert {entry["ended"] for entry in stalled} == {"cancelled"}
    assert summary["tokens"] >= 5 * summary["requests"] + len(stalled)  # each brought one token before
    assert 40 <= sum(entry["ended"] == "cancelled" for entry in log) <= summary["cut"] == 50


def test_failures_are_counted_by_their_kind(server: Any, locust: Locust, tmp_path: Path) -> None:
    plans = ({"error_after": 0}, {"break_after": 2}, {"stall_after": 1}, {"garbage_after": 1}, {"tokens": 2})
    prompts = write_prompts(tmp_path / "prompts.jsonl", *plans)
    arguments = ("OpenAiUser", "--host", server.openai_host, "--users", "5", "--spawn-rate", "5", "--run-time", "4s")
    done = locust(*HEADLESS, *arguments, "--prompts", prompts, "--token-timeout", "0.3", "--result", "r.json")
    assert done.returncode == 1  # as Locust does after failures
    (summary,) = json.loads((tmp_path / "r.json").read_text())["summaries"]
    assert set(summary["failures"]) == {"RequestRejected", "StreamBroken", "TimedOut", "WrongContent"}
    assert summary["requests"] > 0
    assert "the model said no" in done.stderr  # in Locust's own error report


def test_what_nobody_foresaw_is_a_failure_too_and_not_asked_again_in_a_tight_loop(
    server: Any, locust: Locust, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(
        "from stillhouse.loadtest import users\n"
        "class Odd(users.Answer):\n"
        "    def add(self, piece):\n"
        "        raise LookupError('odd')\n"
        "users.Answer = Odd\n"
        "class Mine(users.OpenAiUser):\n"
        "    pass\n"
    )
    arguments = ("-f", "own.py", "--host", server.openai_host, "--users", "2", "--run-time", "3s")
    done = locust(*HEADLESS, *arguments, "--result", "r.json")
    assert done.returncode == 1
    (summary,) = json.loads((tmp_path / "r.json").read_text())["summaries"]
    assert set(summary["failures"]) == {"LookupError"} and 2 <= summary["failures"]["LookupError"] < 12
    assert "LookupError" in done.stderr, "in Locust's own table of failures"


@pytest.mark.slow
def test_stages_of_users_are_followed(server: Any, locust: Locust, tmp_path: Path) -> None:
    stages = "".join(f"[[stage]]\nduration_s = 2\nlevel = {level}\n" for level in (1, 4))
    (tmp_path / "users.toml").write_text(f'unit = "users"\n{stages}')
    done = locust(*HEADLESS, "--host", server.openai_host, "--stages", "users.toml", "--result", "r.json")
    assert done.returncode == 0, done.stderr
    log = server.log()
    first_s = min(entry["came_s"] for entry in log)
    at_once = [sum(one["came_s"] <= entry["came_s"] < one["came_s"] + 0.39 for one in log) for entry in log]
    assert max(at_once) == 4
    assert at_once[0] == at_once[1] == 1, "one user at first"
    assert max(entry["came_s"] for entry in log) - first_s < 8, "it ends by itself"


def test_sampling_options_reach_the_server(server: Any, locust: Locust) -> None:
    arguments = ("--host", server.http_host, "--run-time", "2s", "--model", "support-fp16", "--model-version", "1")
    options = ("--max-tokens", "3", "--ignore-eos", "--temperature", "0.5", "--seed", "7")
    assert locust(*HEADLESS, *arguments, *options).returncode == 0
    entry = server.log()[0]
    assert entry["model"] == "support-fp16"
    sampling = json.loads(entry["inputs"]["sampling_parameters"])
    assert sampling == {"max_tokens": 3, "temperature": 0.5, "seed": 7, "ignore_eos": True}
    assert "messages" in entry["inputs"]


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("--host", "localhost:1"), "cannot reach localhost:1", "is the server started"),
        (("--host", "{grpc}", "--model", "nobody"), "no model 'nobody'", "ready there: support-fp16, support-int4"),
        (("--host", "{grpc}", "--prompts", "empty.jsonl"), "holds no prompt", "every line is"),
        (("--host", "{grpc}", "--prompts", "bad.jsonl"), "bad.jsonl, line 2: not JSON", "every line is"),
        (("--host", "ftp://x"), "begins with grpc:// or http://", "host:port"),
        (("TritonUser", "OpenAiUser", "--host", "{grpc}"), "asks one server over one protocol", "name one user class"),
        (("TritonUser", "--host", "{grpc}", "--timeout", "0"), "timeout_s must be above 0", ""),
        (("--host", "{grpc}", "--slo", "ttft<1s"), "an SLO's part is METRIC_STATISTIC<LIMIT", "--slo"),
    ],
)
def test_bad_input_gets_one_line_and_a_hint(
    server: Any, locust: Locust, tmp_path: Path, arguments: tuple[str, ...], error: str, hint: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\nhello\n')
    given = [argument.format(grpc=server.grpc_host) for argument in arguments]
    done = locust(*HEADLESS, *given, "--run-time", "2s")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert any(line.startswith("error: ") and error in line for line in lines)
    assert not hint or any(line.startswith("hint: ") and hint in line for line in lines)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_web_page_starts_a_test_with_our_options(server: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    locustfile = Path(__file__).parent.parent.parent / "loadtest" / "locustfile.py"
    command = [sys.executable, "-m", "locust", "-f", str(locustfile), "--web-port", str(port), "--result", "r.json"]
    base = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as locust:
        try:
            until(lambda: answers(base))
            page = get(base)
            for option in ("max_tokens", "prompts", "ignore_eos", "slo", "rate", "no_stream", "synthetic", "tokenizer"):
                assert option in page
            form = {"user_count": "2", "spawn_rate": "2", "host": server.grpc_host, "model": "support-fp16"}
            form |= {"max_tokens": "4"}
            swarm(base, form)
            wanted = {("TTFT", "support-fp16"), ("ITL", "support-fp16"), ("E2E", "support-fp16")}
            until(lambda: wanted <= {(row["method"], row["name"]) for row in statistics_of(base)["stats"]})
            urllib.request.urlopen(f"{base}/stop", data=b"", timeout=5).close()
            until((tmp_path / "r.json").exists)
            (summary,) = json.loads((tmp_path / "r.json").read_text())["summaries"]
            assert summary["tokens_per_answer"] == 4
            # A server that is not there is told in the page's table of failures.
            swarm(base, form | {"host": "localhost:1"})
            until(lambda: any("cannot reach localhost:1" in e["error"] for e in statistics_of(base)["errors"]))
        finally:
            locust.terminate()


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as response:
        return str(response.read().decode())


def swarm(base: str, form: dict[str, str]) -> None:
    data = urllib.parse.urlencode(form).encode()
    with urllib.request.urlopen(f"{base}/swarm", data=data, timeout=5) as response:
        assert json.load(response)["success"] is True


def statistics_of(base: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(get(f"{base}/stats/requests"))
    return value


def answers(url: str) -> bool:
    try:
        get(url)
    except OSError:
        return False
    return True


def until(holds: Callable[[], bool], timeout_s: float = 30) -> None:
    ends = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < ends, "did not come to hold in time"
        time.sleep(0.2)
