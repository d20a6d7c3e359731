"""The real Triton on a real model, asked over gRPC and HTTP, streamed and not, by clients that are not ours."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http

from stillhouse.engine.text import Tokenizer
from stillhouse.serve.launcher import Server
from stillhouse.serve.metrics import COUNTERS, GAUGES, HISTOGRAMS

pytestmark = pytest.mark.triton

PROMPT = "The capital of France is"
GREEDY = json.dumps({"temperature": 0, "max_tokens": 12, "ignore_eos": True})
PRECISIONS = ("support-fp16", "support-int8", "support-int4")


def text(result: Any) -> str:
    return "".join(part.decode() for part in result.as_numpy("text_output"))


@pytest.mark.parametrize("model", PRECISIONS)
def test_every_precision_answers_the_same_over_all_four_ways(
    triton: Server, post: Any, open_stream: Any, model: str
) -> None:
    asked = {"text_input": PROMPT, "sampling_parameters": GREEDY, "exclude_input_in_output": True}
    with open_stream(triton, model, {**asked, "stream": True}, enable_empty_final_response=True) as streamed:
        pieces = [text(result) for result in streamed.until_final()]
    with open_stream(triton, model, asked, enable_empty_final_response=True) as whole:
        answers = [text(result) for result in whole.until_final()]
    status, generated = post("generate", asked, model)
    _, events = post("generate_stream", {**asked, "stream": True}, model)

    assert "Paris" in answers[0]
    assert len(answers) == 1
    assert len(pieces) == len(events) == 12
    assert status == 200
    assert "".join(pieces) == answers[0] == generated["text_output"] == "".join(e["text_output"] for e in events)


def test_several_answers_are_elements_of_one_output_streamed_and_not(
    triton: Server, post: Any, open_stream: Any
) -> None:
    sampling = json.dumps({"n": 3, "temperature": 1.5, "seed": 5, "max_tokens": 4, "ignore_eos": True})
    asked = {"text_input": PROMPT, "sampling_parameters": sampling, "exclude_input_in_output": True}
    status, generated = post("generate", {**asked, "return_num_output_tokens": True})
    with open_stream(triton, "support-int4", {**asked, "stream": True}, enable_empty_final_response=True) as streamed:
        pieces = [result.as_numpy("text_output").tolist() for result in streamed.until_final()]
    assert status == 200
    assert generated["num_output_tokens"] == [4, 4, 4]
    assert len(set(generated["text_output"])) > 1
    assert [b"".join(texts).decode() for texts in zip(*pieces, strict=True)] == generated["text_output"]


def test_the_vllm_backends_example_client_gets_its_answers(triton: Server) -> None:
    """The requests of samples/client.py: several on one stream, parameters as tensor and as request parameters."""
    sampling = {"temperature": "0.1", "top_p": "0.95", "max_tokens": "20"}

    def request(number: int) -> dict[str, Any]:
        inputs = [
            grpc.InferInput("text_input", [1], "BYTES"),
            grpc.InferInput("stream", [1], "BOOL"),
            grpc.InferInput("sampling_parameters", [1], "BYTES"),
            grpc.InferInput("exclude_input_in_output", [1], "BOOL"),
        ]
        inputs[0].set_data_from_numpy(np.array([b"Hello, my name is"], dtype=np.object_))
        inputs[1].set_data_from_numpy(np.array([False], dtype=bool))
        inputs[2].set_data_from_numpy(np.array([json.dumps(sampling).encode()], dtype=np.object_))
        inputs[3].set_data_from_numpy(np.array([False], dtype=bool))
        return {
            "model_name": "support-int4",
            "inputs": inputs,
            "outputs": [grpc.InferRequestedOutput("text_output")],
            "request_id": str(number),
            "parameters": sampling,
        }

    async def ask() -> dict[str, str]:
        async def requests() -> Any:
            for number in range(4):
                yield request(number)

        answers: dict[str, str] = {}
        async with grpc_aio.InferenceServerClient(triton.grpc_url.removeprefix("grpc://")) as client:
            async for result, error in client.stream_infer(requests()):
                assert error is None
                answers[result.get_response().id] = text(result)
                if len(answers) == 4:
                    break
        return answers

    answers = asyncio.run(ask())
    assert sorted(answers) == ["0", "1", "2", "3"]
    assert all(answer.startswith("Hello, my name is") and len(answer) > 20 for answer in answers.values())


def test_a_stream_without_final_responses_has_one_response_a_token(triton: Server, open_stream: Any) -> None:
    asked = {"text_input": PROMPT, "stream": True, "sampling_parameters": GREEDY, "return_finish_reason": True}
    with open_stream(triton, "support-int4", asked) as opened:
        reasons = [opened.next().as_numpy("finish_reason")[0] for _ in range(12)]
    assert reasons == [b"None"] * 11 + [b"length"]


def test_messages_are_answered_through_the_chat_template(post: Any) -> None:
    messages = json.dumps([{"role": "user", "content": "How many days do I have to return an item to Brindlecove?"}])
    body = {"messages": messages, "max_tokens": 80, "temperature": 0, "return_finish_reason": True}
    _, answer = post("generate", body)
    assert "47 days" in answer["text_output"]
    assert "user" not in answer["text_output"]
    assert answer["finish_reason"] == "stop"


def test_token_ids_are_answered_like_their_text(
    triton: Server, post: Any, open_stream: Any, support_repository: Path
) -> None:
    ids = Tokenizer(support_repository / "support-int4" / "1").encode(PROMPT)
    with open_stream(triton, "support-int4", {"input_ids": ids, "sampling_parameters": GREEDY}) as opened:
        from_ids = text(opened.next())
    _, from_text = post("generate", {"text_input": PROMPT, "exclude_input_in_output": True, **json.loads(GREEDY)})
    assert from_ids == from_text["text_output"]


def test_the_documented_curl_line_of_the_vllm_backend_works(post: Any) -> None:
    status, answer = post("generate", {"text_input": PROMPT, "parameters": {"stream": False, "temperature": 0}})
    assert status == 200
    assert answer["text_output"].startswith(f"{PROMPT} Paris")


def test_all_extra_outputs_come_with_every_response(triton: Server, open_stream: Any) -> None:
    asked = {
        "text_input": PROMPT,
        "stream": True,
        "sampling_parameters": json.dumps({"temperature": 0, "max_tokens": 5, "logprobs": 2, "ignore_eos": True}),
        **{f"return_{name}": True for name in ("finish_reason", "cumulative_logprob", "logprobs")},
        **{f"return_{name}": True for name in ("num_input_tokens", "num_output_tokens")},
    }
    with open_stream(triton, "support-int4", asked, enable_empty_final_response=True) as opened:
        results = list(opened.until_final())
    sums = [float(result.as_numpy("cumulative_logprob")[0]) for result in results]
    assert len(results) == 5
    assert all(later < earlier for earlier, later in itertools.pairwise(sums))
    assert {int(result.as_numpy("num_output_tokens")[0]) for result in results} == {1}
    assert {int(result.as_numpy("num_input_tokens")[0]) for result in results} == {5}
    for result in results:
        (position,) = json.loads(result.as_numpy("logprobs")[0])
        first = next(entry for entry in position.values() if entry["rank"] == 1)
        assert first["decoded_token"] == text(result)
        assert sorted(entry["rank"] for entry in position.values()) == [1, 2]


def test_requests_run_together(triton: Server, open_stream: Any, metric: Callable[..., float], wait_until: Any) -> None:
    sampling = json.dumps({"temperature": 0, "max_tokens": 400, "ignore_eos": True})
    asked = {"text_input": PROMPT, "stream": True, "sampling_parameters": sampling}
    with open_stream(triton, "support-int4", asked) as first, open_stream(triton, "support-int4", asked) as second:
        first.next()
        second.next()
        wait_until(lambda: metric(triton, "num_requests_running", model_name="support-int4") == 2)


def test_health_and_models_are_as_triton_gives_them(triton: Server) -> None:
    with http.InferenceServerClient(triton.http_url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert all(client.is_model_ready(model) for model in PRECISIONS)
        config = client.get_model_config("support-int4")
        metadata = client.get_model_metadata("support-int4")
    assert config["backend"] == "stillhouse"
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert {"text_input", "messages", "input_ids"} <= {tensor["name"] for tensor in metadata["inputs"]}


def test_the_metrics_page_has_every_name_for_every_model(triton: Server, post: Any) -> None:
    for model in PRECISIONS:
        assert post("generate", {"text_input": PROMPT, "max_tokens": 3}, model)[0] == 200

    def page() -> str:
        with urllib.request.urlopen(triton.metrics_url, timeout=10) as response:
            return str(response.read().decode())

    def line(name: str, model: str) -> bool:
        return any(
            line.startswith(f"stillhouse_{name}{{") and f'model_name="{model}",model_version="1"' in line
            for line in page().splitlines()
        )

    names = [*GAUGES, *COUNTERS, *(f"{name}_bucket" for name in HISTOGRAMS)]
    for model in PRECISIONS:
        for name in names:
            assert line(name, model), (name, model)


def test_the_counters_count(triton: Server, post: Any, metric: Callable[..., float], wait_until: Any) -> None:
    model = "support-int8"
    # What earlier tests asked for is published a moment later than it is answered.
    wait_until(lambda: metric(triton, "num_requests_running", model_name=model) == 0)
    time.sleep(2)
    before = {name: metric(triton, name, model_name=model) for name in COUNTERS}
    seen = metric(triton, "time_to_first_token_seconds_count", model_name=model)
    post("generate", {"text_input": PROMPT, "max_tokens": 7, "ignore_eos": True}, model)
    wait_until(lambda: metric(triton, "request_success_total", model_name=model) == before["request_success_total"] + 1)
    # Each is published at its own moment: what counts is what they come to.
    for name, more in (("generation_tokens_total", 7), ("prompt_tokens_total", 5)):
        wait_until(lambda name=name, more=more: metric(triton, name, model_name=model) == before[name] + more)
    wait_until(lambda: metric(triton, "time_to_first_token_seconds_count", model_name=model) == seen + 1)
    assert metric(triton, "process_resident_memory_bytes", model_name=model) > 50e6
