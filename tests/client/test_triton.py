"""The client, and Locust with it, against a real Triton that serves the real model."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse.client import AsyncClient, Client, ModelNotFound, RequestRejected, TimedOut
from stillhouse.serve.launcher import Server, running_server

pytestmark = pytest.mark.triton

MODEL = "support-int4"
QUESTION = [{"role": "user", "content": "How many days do I have to return an item to Brindlecove?"}]
GREEDY = {"temperature": 0.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def triton(support_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log_file = tmp_path_factory.mktemp("triton") / "triton.log"
    with running_server(support_repository, models=[MODEL], log_file=log_file) as server:
        yield server


@pytest.fixture
def client(triton: Server, scheme: str) -> Iterator[Client]:
    with Client(triton.grpc_url if scheme == "grpc" else triton.http_url) as client:
        yield client


def test_streamed_and_whole_answers_agree_over_both_transports(triton: Server) -> None:
    with Client(triton.grpc_url) as grpc, Client(triton.http_url) as http:
        answers = [client.chat(MODEL, QUESTION, **GREEDY) for client in (grpc, http)]
        streams = [list(client.chat(MODEL, QUESTION, stream=True, **GREEDY)) for client in (grpc, http)]
    assert "47 days" in answers[0].text
    assert {answer.text for answer in answers} == {"".join(token.text for token in tokens) for tokens in streams}
    for answer, tokens in zip(answers, streams, strict=True):
        assert tokens[-1].num_output_tokens == answer.num_output_tokens == len(tokens)
        assert tokens[-1].num_input_tokens == answer.num_input_tokens
        assert tokens[-1].finish_reason == answer.finish_reason
        assert tokens[-1].cumulative_logprob == pytest.approx(answer.cumulative_logprob, abs=1e-4)
        assert all(earlier.time_s <= later.time_s for earlier, later in itertools.pairwise(tokens))


async def test_the_async_client_says_the_same(triton: Server) -> None:
    async with AsyncClient(triton.grpc_url) as grpc, AsyncClient(triton.http_url) as http:
        texts = [(await client.generate(MODEL, "The capital of Italy is", **GREEDY)).text for client in (grpc, http)]
        streamed = [token.text async for token in grpc.stream(MODEL, "The capital of Italy is", **GREEDY)]
    assert texts[0] == texts[1] == "".join(streamed)


def test_refusals_are_told_apart_and_leave_the_server_standing(client: Client) -> None:
    for _ in range(3):
        with pytest.raises(RequestRejected, match="max_tokens must be at least 1") as caught:
            client.generate(MODEL, "x", max_tokens=0)
        assert type(caught.value) is RequestRejected
        with pytest.raises(RequestRejected, match="unknown sampling parameter"):
            list(client.stream(MODEL, "x", max_tokns=3))
        with pytest.raises(ModelNotFound):
            client.generate("nobody", "x")
        with pytest.raises(ModelNotFound):
            list(client.stream(MODEL, "x", version=99))
    assert client.generate(MODEL, input_ids=[504, 3575], **GREEDY).num_input_tokens == 2


def test_a_time_out_and_a_closed_stream_leave_room_for_the_next(client: Client) -> None:
    with pytest.raises(TimedOut):
        list(client.stream(MODEL, "Once upon a time", max_tokens=1500, ignore_eos=True, timeout_s=0.5))
    stream = client.stream(MODEL, "Once upon a time", max_tokens=1500, ignore_eos=True)
    next(stream)
    stream.close()
    assert client.generate(MODEL, "Hello", max_tokens=3, temperature=0.0).num_output_tokens is not None


def test_models_and_ready(client: Client) -> None:
    assert MODEL in [entry.name for entry in client.models() if entry.ready]
    assert client.ready()
    assert client.ready(MODEL)
    assert not client.ready("nobody")


@pytest.mark.slow
def test_locust_measures_the_real_server(triton: Server) -> None:
    from stillhouse.loadtest.load import Load
    from stillhouse.loadtest.run import run_locust

    load = Load(users=2, duration_s=5, max_tokens=4, ignore_eos=True)
    result = run_locust(triton.grpc_url, MODEL, load, metrics_url=triton.metrics_url)
    assert result.summary.failures == {}
    assert result.summary.requests > 0
    assert result.summary.tokens_per_answer == 4
    assert result.summary.counted_by_server
    assert result.memory_bytes is not None
    assert 50e6 < result.memory_bytes < 5e9
    assert result.queue is not None and result.queue.count > 0


def test_the_command_prints_the_answer_alone(triton: Server) -> None:
    command = [sys.executable, "-m", "stillhouse.cli.main", "generate", triton.http_url, MODEL]
    command += ["--prompt", QUESTION[0]["content"], "--max-tokens", "24"]
    with Client(triton.http_url) as client:
        answer = client.chat(MODEL, QUESTION, **GREEDY)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{answer.text}\n"
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["num_output_tokens"] == answer.num_output_tokens
