"""Whatever is wrong gets OpenAI's error with the status that fits, and harms nobody else."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from stillhouse.engine.errors import InvalidRequest, UsageError
from stillhouse.gateway.app import create_app
from stillhouse.gateway.errors import api_error
from stillhouse.gateway.gateway import Access, Gateway, read_keys
from stillhouse.gateway.server import GatewayServer

CHAT = "/v1/chat/completions"
SOUND: Any = {"model": "support-int4", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TEXT_PART = {"type": "text", "text": "Hi"}
KEY = {"Authorization": "Bearer sesame"}


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return dict(body["error"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"{", "must be JSON"),
        (b"[]", "must be a JSON object"),
        (b'"\xff"', "must be UTF-8"),
        (b'{"model": "\\ud800"}', "surrogate"),
        (b'{"temperature": NaN}', "must be JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "must be JSON"),
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(http: httpx.Client, body: bytes, words: str) -> None:
    refused = http.post(CHAT, content=body)
    assert refused.status_code == 400
    assert words in error_of(refused)["message"]


@pytest.mark.parametrize("field", ["temperature", "messages", "stop", "logit_bias", "response_format", "guided_json"])
def test_a_value_that_is_deep_is_refused_in_short(http: httpx.Client, field: str) -> None:
    for depth in (400, 900):
        deep = json.dumps(SOUND)[:-1] + f', "{field}": {"[" * depth}{"]" * depth}}}'
        refused = http.post(CHAT, content=deep.encode())
        assert refused.status_code == 400, refused.text
        assert len(error_of(refused)["message"]) < 1000


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**4300 - 1}, "max_tokens"),
        ({"max_tokens": None, "max_completion_tokens": 10**4300 - 1}, "max_completion_tokens"),
        ({"min_tokens": 2**31}, "min_tokens"),
        ({"thinking_token_budget": 2**31}, "thinking_token_budget"),
        ({"top_k": 2**31}, "top_k"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"content": "Hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": "Hi", "colour": "red"}]}, "messages.0.colour"),
        ({"messages": [{"role": "tool", "content": "Hi", "tool_call_id": "1"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "Hi", "name": 5}]}, "messages.0.name"),
        (
            {"messages": [{"role": "assistant", "content": "Hi", "reasoning_content": 7}]},
            "messages.0.reasoning_content",
        ),
        ({"messages": [{"role": "assistant", "content": "Hi", "refusal": {"a": 1}}]}, "messages.0.refusal"),
        ({"messages": [{"role": "assistant", "content": "Hi", "refusal": "No"}]}, "messages.0.refusal"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [TEXT_PART | {"cache": 1}]}]}, "messages.0.content.0.cache"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"temprature": 1}, "temprature"),
        ({"stop": [""]}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {" 5 ": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1, "05": 1}}, "logit_bias"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_regex": "(", "stream": True}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, "response_format"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"thinking_token_budget": 3}, "thinking_token_budget"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tools": [5], "tool_choice": "none"}, "tools.0"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"seed": 2**70}, "seed"),
        ({"priority": 2**31}, "priority"),
        ({"store": True}, "store"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"include_usage": True}, "stream": False}, "stream_options"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"length_penalty": True}, "length_penalty"),
        ({"best_of": 2}, "best_of"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"max_tokens": 10.5}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"repetition_detection": {"max_pattern_size": 4}}, "repetition_detection"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"model": "thinker-int4", "include_reasoning": False}, "include_reasoning"),
        ({"skip_special_tokens": False, "spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
        ),
        ({"messages": [{"role": "assistant", "content": "Hi", "reasoning": 7}]}, "messages.0.reasoning"),
    ],
)
def test_a_field_that_is_wrong_is_named(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    refused = http.post(CHAT, json=SOUND | change)
    assert refused.status_code == 400, refused.text
    assert error_of(refused)["param"] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [9_999_999]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({}, "prompt"),
    ],
)
def test_a_completions_field_that_is_wrong_is_named(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    refused = http.post("/v1/completions", json={"model": "support-int4", **change})
    assert refused.status_code == 400, refused.text
    assert error_of(refused)["param"] == param


@pytest.mark.parametrize("more", [{"prompt": "word " * 600}, {"prompt": "a", "max_tokens": 512}])
def test_what_is_longer_than_the_context_says_so(http: httpx.Client, more: dict[str, Any]) -> None:
    refused = http.post("/v1/completions", json={"model": "support-int4", **more})
    error = error_of(refused)
    assert refused.status_code == 400
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 512 tokens" in error["message"]


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ("messages[1].tool_calls[0].function.arguments must be a text", "messages"),
        ("n: 90 answers are more than run here", "n"),
        ("stop_token_ids: token id 9 is not in the vocabulary", "stop_token_ids"),
        ("the prompt is empty", None),
    ],
)
def test_an_error_of_the_engines_names_the_field_that_it_begins_with(said: str, param: str | None) -> None:
    assert api_error(InvalidRequest(said)).param == param


def test_an_unknown_model_is_not_found(client: openai.OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=SOUND["messages"])
    assert caught.value.code == "model_not_found"
    assert http.get("/v1/models/gpt-4").status_code == 404
    assert http.get("/v1/models/support-int4").json()["id"] == "support-int4"
    assert [model.id for model in client.models.list()] == ["support-int4", "thinker-int4"]


def test_unknown_paths_and_methods_have_their_status(http: httpx.Client) -> None:
    missed = http.post("/chat/completions", json=SOUND)
    assert (missed.status_code, error_of(missed)["code"]) == (404, "unknown_url")
    assert "Here are /v1/models, /v1/chat/completions, /v1/completions" in error_of(missed)["message"]
    wrong = http.get(CHAT)
    assert error_of(wrong)
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    # No redirect either: its target would be whatever Host the request names.
    slashed = http.post(f"{CHAT}/", json=SOUND, headers={"Host": "elsewhere.example"})
    assert (slashed.status_code, error_of(slashed)["code"]) == (404, "unknown_url")


def test_the_version_may_be_asked_as_in_vllm(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": importlib.metadata.version("stillhouse")}


def test_what_may_be_got_may_be_asked_for_by_head(http: httpx.Client) -> None:
    for path in ("/", "/health", "/ping", "/version", "/metrics", "/v1/models", "/v1/models/support-int4"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b""), path


def test_a_body_in_another_coding_is_refused_by_its_name(http: httpx.Client) -> None:
    packed = gzip.compress(json.dumps(SOUND).encode())
    refused = http.post(CHAT, content=packed, headers={"Content-Encoding": "gzip"})
    assert refused.status_code == 415
    assert error_of(refused)["message"] == "Content-Encoding 'gzip' is not read here: send the body as it is"


@pytest.mark.parametrize(
    "field", [{"prompt": [{}] * 50_000}, {"stop": [0] * 50_000}, {f"x{n}": 1 for n in range(50_000)}]
)
def test_a_body_of_many_faults_costs_no_more_than_its_first(http: httpx.Client, field: dict[str, Any]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = http.post("/v1/completions", json={"model": SOUND["model"], "prompt": "x", **field})
    assert answer.status_code == 400
    assert len(answer.json()["error"]["message"]) < 2000
    # A fault each would take a kilobyte each: 150 MB here.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000


@pytest.mark.parametrize("chunked", [True, False])
def test_only_a_body_beyond_16_mib_is_too_large(http: httpx.Client, chunked: bool) -> None:
    def body(size: int) -> bytes | Iterator[bytes]:
        data = json.dumps(SOUND | {"user": ""})[:-2].encode()
        data += b"x" * (size - len(data) - 2) + b'"}'
        return (data[at : at + 2**20] for at in range(0, size, 2**20)) if chunked else data

    assert http.post(CHAT, content=body(16 * 2**20)).status_code == 200
    refused = http.post(CHAT, content=body(16 * 2**20 + 1))
    assert refused.status_code == 413
    assert error_of(refused)


def test_with_keys_only_who_brings_one_is_answered(narrow_server: GatewayServer) -> None:
    with httpx.Client(base_url=narrow_server.url) as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
            refused = http.get("/v1/models", headers=headers)
            assert refused.status_code == 401
            assert error_of(refused)["code"] == "invalid_api_key"
        assert http.get("/metrics").status_code == 401
        assert http.get("/v1/models", headers=KEY).status_code == 200
        assert http.get("/health").status_code == http.post("/ping").status_code == 200
        assert "sesame" not in repr(Access(("sesame",)))


def test_keys_come_from_words_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n two \n", "utf-8")
    assert read_keys(["zero"], file, "three") == ("zero", "three", "one", "two")
    file.write_text("# none\n", "utf-8")
    with pytest.raises(UsageError, match="holds no key"):
        read_keys([], file, None)
    with pytest.raises(UsageError, match="printable"):
        read_keys(["a b"], None, None)
    # Set and empty is not "no keys": whoever sets it does not want everybody to be let in.
    with pytest.raises(UsageError, match="not empty"):
        read_keys([], None, "")


def test_a_full_queue_is_a_429_and_the_others_are_answered(
    narrow_server: GatewayServer, wait_until: Callable[..., float]
) -> None:
    generator = narrow_server.gateway.generator
    assert generator is not None
    statuses: list[int] = []
    asked = SOUND | {"max_tokens": 60, "ignore_eos": True}

    def ask() -> None:
        response = httpx.post(narrow_server.url + CHAT, json=asked, headers=KEY, timeout=60)
        statuses.append(response.status_code)
        if response.status_code == 429:
            assert response.headers["retry-after"]
            assert error_of(response)["code"] == "queue_full"

    askers = [threading.Thread(target=ask) for _ in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert set(statuses) == {200, 429}
    assert 3 <= statuses.count(200) <= 4
    wait_until(lambda: sum(figure.value for figure in generator.figures() if "running" in figure.name) == 0)


async def test_503_while_loading_and_while_draining() -> None:
    gateway = Gateway()
    transport = httpx.ASGITransport(create_app(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
        for path in ("/health", "/ping", "/v1/models"):
            refused = await http.get(path)
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert "loaded" in error_of(refused)["message"]
        gateway.draining = True
        refused = await http.post(CHAT, json=SOUND)
        assert refused.status_code == 503
        assert "shutting down" in error_of(refused)["message"]
        assert (await http.get("/metrics")).status_code == 200


async def test_pages_of_other_sites_may_not_ask_unless_they_are_named() -> None:
    elsewhere = {"Origin": "https://elsewhere.example", "Sec-Fetch-Site": "cross-site"}
    for origins, status in (((), 403), (("https://elsewhere.example",), 503), (("*",), 503)):
        transport = httpx.ASGITransport(create_app(Gateway(Access(cors_origins=origins))))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            asked = await http.post(CHAT, json=SOUND, headers=elsewhere)
            assert asked.status_code == status
            assert ("access-control-allow-origin" in asked.headers) == bool(origins)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 503),  # curl, packages
        ({"Origin": "http://here:9000"}, 503),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://here"}, 403),
        ({"Origin": "http://here:9000.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "https://app.example"}, 503),  # --cors-origin names it
        ({"Origin": "https://here.example", "Host": "Here.example"}, 503),  # behind a proxy
        ({"Origin": "https://here.example", "Host": "here.example:443"}, 503),
        ({"Origin": "https://here.example", "X-Forwarded-Host": "here.example"}, 503),
        ({"Origin": "https://here.example", "Sec-Fetch-Site": "same-origin"}, 503),  # a proxy that loses the name
        ({"Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
async def test_an_origin_that_is_not_the_gateways_own_is_refused_also_where_the_browser_says_no_more(
    headers: dict[str, str], status: int
) -> None:
    transport = httpx.ASGITransport(create_app(Gateway(Access(cors_origins=("https://app.example",)))))
    async with httpx.AsyncClient(transport=transport, base_url="http://here:9000") as http:
        asked = await http.post(CHAT, json=SOUND, headers=headers)
    assert asked.status_code == status
    assert (error_of(asked)["code"] == "cross_origin") == (status == 403)


async def test_a_page_that_is_named_may_send_the_headers_of_openais_package() -> None:
    page = "https://app.example"
    transport = httpx.ASGITransport(create_app(Gateway(Access(("sesame",), (page,)))))
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
        allowed = await http.options(CHAT, headers={"Origin": page, **asks})
        refused = await http.options(CHAT, headers={"Origin": "https://elsewhere.example", **asks})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == page
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-origin" not in refused.headers
