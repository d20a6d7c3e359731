"""The load test against the real server: the three protocols count the same tokens of the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.loadtest.load import Load
from stillhouse.loadtest.run import LoadResult, run_locust
from stillhouse.serve.launcher import Server
from stillhouse.serve.openai import running_gateway

pytestmark = [pytest.mark.triton, pytest.mark.slow]

QUESTION = '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}\n'


def test_the_three_protocols_give_the_same_counts(triton: Server, support_repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(QUESTION)
    load = Load(users=2, duration_s=5, max_tokens=32, prompts=path)
    with running_gateway(triton, support_repository) as gateway:
        results: dict[str, LoadResult] = {
            url: run_locust(url, "support-int4", load, metrics_url=triton.metrics_url)
            for url in (triton.grpc_url, triton.http_url, gateway.url)
        }
    assert [result.load.protocol for result in results.values()] == ["triton", "triton", "openai"]
    for url, result in results.items():
        summary = result.summary
        assert summary.failures == {}, url
        assert summary.requests > 2
        assert summary.counted_by_server
        assert result.queue is not None and result.queue.count > 0
        assert result.memory_bytes is not None
    lengths = {result.summary.tokens_per_answer for result in results.values()}
    assert len(lengths) == 1, "one question, greedily: every answer has the same tokens"
    prompts = {result.summary.prompt_tokens_per_request for result in results.values()}
    assert len(prompts) == 1 and None not in prompts
    print({url: result.summary.tokens_per_s for url, result in results.items()})
