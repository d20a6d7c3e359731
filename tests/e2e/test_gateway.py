"""The gateway before a real Triton: the same answers, versions that change under it, clients and models that go."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import tritonclient.grpc as grpc

from stillhouse.engine.model import LanguageModel
from stillhouse.engine.options import EngineOptions
from stillhouse.engine.policy import set_live_versions
from stillhouse.engine.sampling import SamplingParams
from stillhouse.gateway.server import GatewayServer
from stillhouse.serve.launcher import Server, running_server
from stillhouse.serve.openai import running_gateway

pytestmark = pytest.mark.triton

MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: Any = {"model": "support-int4", "messages": MESSAGES, "temperature": 0, "max_tokens": 16}
ENDLESS: Any = {**GREEDY, "max_tokens": 1500, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def gateway(support_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayServer]:
    """Before a server that reuses no prompts, after which answers may differ in their last bits."""
    log_file = tmp_path_factory.mktemp("gateway") / "triton.log"
    with (
        running_server(
            support_repository, models=["support-int4"], engine={"prefix_slots": 0}, log_file=log_file
        ) as server,
        running_gateway(server, support_repository) as running,
    ):
        yield running


def test_it_answers_as_the_engine_does_streamed_and_not(gateway: GatewayServer, support_repository: Path) -> None:
    with LanguageModel.load(support_repository / "support-int4" / "1", EngineOptions(prefix_slots=0)) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=16, logprobs=2)
        chunks = list(engine.stream(engine.prompt_ids(messages=MESSAGES), params))
    own = [chunk for chunk in chunks if chunk.token_ids]
    asked = {**GREEDY, "logprobs": True, "top_logprobs": 2}
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["support-int4"]
        whole = client.chat.completions.create(**asked)
        pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert whole.choices[0].message.content == "".join(chunk.text for chunk in own)
    assert [token.logprob for token in logprobs.content] == pytest.approx([chunk.logprob for chunk in own], abs=1e-4)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed == whole.choices[0].message.content
    assert pieces[-1].usage == whole.usage


def test_prompts_are_echoed_with_their_logprobs(gateway: GatewayServer) -> None:
    body = {"model": "support-int4", "prompt": ["The capital of France is", "Water"], "max_tokens": 1, "temperature": 0}
    body |= {"echo": True, "logprobs": 1, "prompt_logprobs": 2}
    answer = httpx.post(f"{gateway.url}/v1/completions", json=body, timeout=60).json()
    for choice in answer["choices"]:
        for position in choice["prompt_logprobs"][1:]:
            assert {1, 2} <= {entry["rank"] for entry in position.values()}
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert all(value < 0 for value in choice["logprobs"]["token_logprobs"][1:])


def test_several_answers_and_structured_ones(gateway: GatewayServer) -> None:
    sampled = {**GREEDY, "temperature": 1.5, "seed": 3, "n": 3}
    first, again = (httpx.post(f"{gateway.url}/v1/chat/completions", json=sampled, timeout=60).json() for _ in range(2))
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert len(set(texts)) > 1
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    chosen = httpx.post(
        f"{gateway.url}/v1/chat/completions", json={**GREEDY, "guided_choice": ["left", "right"]}, timeout=60
    ).json()
    assert chosen["choices"][0]["message"]["content"] in ("left", "right")


def test_what_the_engine_refuses_is_a_400(gateway: GatewayServer) -> None:
    for change in ({"logit_bias": {"9999999": 1}}, {"guided_regex": "("}, {"thinking_token_budget": 1}):
        refused = httpx.post(f"{gateway.url}/v1/chat/completions", json=GREEDY | change, timeout=60)
        assert refused.status_code == 400, refused.text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        # Known only behind the first token; two fields rule each other out.
        ({"guided_choice": ["a"], "min_tokens": 12}, None),
        # With words in it that the server has for its own faults.
        ({"guided_regex": "(internal error"}, "guided_regex"),
        ({"guided_regex": "(3 requests are waiting, the context holds"}, "guided_regex"),
    ],
)
def test_a_fault_of_the_request_is_a_400_wherever_it_shows_and_whatever_it_says(
    gateway: GatewayServer, change: dict[str, Any], param: str | None
) -> None:
    refused = httpx.post(f"{gateway.url}/v1/chat/completions", json=GREEDY | change, timeout=60)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == (param, None)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_gives_its_slot_back(
    narrow_triton: Server,
    support_repository: Path,
    metric: Callable[..., float],
    wait_until: Callable[..., float],
    stream: bool,
) -> None:
    with running_gateway(narrow_triton, support_repository, engine={"max_num_seqs": 1}) as gateway:
        data = json.dumps(ENDLESS | {"stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            connection.sendall(head.encode() + data)
            wait_until(lambda: metric(narrow_triton, "num_requests_running") == 1)
        begun = time.monotonic()
        # The only slot is free again: another question is answered.
        assert httpx.post(f"{gateway.url}/v1/chat/completions", json=GREEDY, timeout=60).status_code == 200
        assert time.monotonic() - begun < 10


@pytest.mark.slow
def test_a_new_version_takes_over_and_the_old_one_comes_back_without_a_failure(
    support_repository: Path, tmp_path: Path
) -> None:
    model = tmp_path / "repository" / "support-int4"
    shutil.copytree(support_repository / "support-int4", model, copy_function=os.symlink)
    shutil.copytree(support_repository / "support-int4" / "1", model / "2", copy_function=os.symlink)
    manifest = json.loads((model / "1" / "manifest.json").read_text("utf-8"))
    (model / "2" / "manifest.json").unlink()
    (model / "2" / "manifest.json").write_text(json.dumps(manifest | {"version": 2}), "utf-8")
    config = (model / "config.pbtxt").read_text("utf-8")
    (model / "config.pbtxt").unlink()
    (model / "config.pbtxt").write_text(config, "utf-8")
    set_live_versions(model, [1])

    seen: list[tuple[int, str]] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            response = httpx.post(f"{gateway.url}/v1/chat/completions", json=GREEDY | {"max_tokens": 3}, timeout=60)
            seen.append((response.status_code, response.json().get("system_fingerprint", response.text)))

    log_file = tmp_path / "triton.log"
    with (
        running_server(model.parent, log_file=log_file) as server,
        running_gateway(server, model.parent) as gateway,
        contextlib.closing(grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://"))) as triton,
    ):
        asker = threading.Thread(target=ask)
        asker.start()
        for version in (2, 1, 2):
            set_live_versions(model, [version])
            triton.load_model("support-int4")
            time.sleep(1.5)
            assert httpx.get(f"{gateway.url}/v1/models/support-int4").json()["version"] == version
        over.set()
        asker.join()
    assert {status for status, _ in seen} == {200}
    assert {name for _, name in seen} == {"support-int4-v1", "support-int4-v2"}


@pytest.mark.slow
def test_a_model_whose_process_is_killed_ends_its_streams_by_name(
    support_repository: Path,
    tmp_path: Path,
    wait_until: Callable[..., float],
    status_of: Callable[[str], int],
) -> None:
    log_file = tmp_path / "triton.log"
    with (
        running_server(support_repository, models=["support-int4"], log_file=log_file, grace_s=1.0) as server,
        running_gateway(server, support_repository, grace_s=0.0) as gateway,
    ):
        url = f"{gateway.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=ENDLESS, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            for child in psutil.Process(server.pid).children():
                child.kill()
            killed = time.monotonic()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert time.monotonic() - killed < 10
        assert events[-1]["error"]["code"] == "service_unavailable"
        assert "went down" in events[-1]["error"]["message"]
        wait_until(lambda: status_of(f"{gateway.url}/health") == 503)
        refused = httpx.post(url, json=GREEDY, timeout=60)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]


@pytest.mark.slow
def test_the_command_serves_says_503_until_it_can_and_drains(
    support_repository: Path, free_ports: list[str], tmp_path: Path
) -> None:
    words = ["serve", "--repository", str(support_repository), "--models", "support-int4", "--grace", "20"]
    command = [sys.executable, "-m", "stillhouse.cli.main", *words, *free_ports, "--log-file", str(tmp_path / "log")]
    url = f"http://127.0.0.1:{free_ports[-1]}"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as served:
        try:
            statuses = []
            begun = time.monotonic()
            while not statuses or statuses[-1] != 200:
                assert time.monotonic() - begun < 120
                with contextlib.suppress(httpx.ConnectError):
                    statuses.append(httpx.get(f"{url}/health").status_code)
                time.sleep(0.1)
            assert set(statuses) == {503, 200}
            with httpx.stream(
                "POST", f"{url}/v1/chat/completions", json=ENDLESS | {"max_tokens": 150}, timeout=60
            ) as r:
                lines = r.iter_lines()
                next(lines)
                served.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
            out, _ = served.communicate(timeout=60)
        finally:
            served.kill()
    assert served.returncode == 0
    assert f"openai   {url}/v1" in out
