"""The same bytes, the same engine: what Triton answers, the edge runner answers, token by token."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stillhouse.edge.loading import ONE_ANSWER, load
from stillhouse.engine.sampling import SamplingParams

pytestmark = pytest.mark.triton

TOKENS = 16
QUESTIONS = (
    "How do I return a parcel?",
    "May I return the boots?",
    "Where is my order?",
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Count from one to ten.",
    "¿Qué hora es? 🙂",
    "What does this do: for (int i = 0; i < n; i++) sum += a[i];",
    "Tell me about whisky. " * 12,  # longer than a chunk of prefill
)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param("support-fp16", marks=pytest.mark.slow),
        pytest.param("support-int8", marks=pytest.mark.slow),
        "support-int4",
    ],
)
def test_triton_and_the_edge_runner_give_the_same_greedy_answers(
    post: Any, support_repository: Path, model: str
) -> None:
    """Triton is asked all at once, so that it batches them; the edge runner, as a device does, one at a time."""

    def ask_triton(question: str) -> str:
        asked = {
            "messages": json.dumps([{"role": "user", "content": question}]),
            "sampling_parameters": json.dumps({"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}),
            "exclude_input_in_output": True,
        }
        status, answer = post("generate", asked, model)
        assert status == 200, answer
        return str(answer["text_output"])

    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        cloud = list(pool.map(ask_triton, QUESTIONS))
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    with load(support_repository / model / "1", ONE_ANSWER) as runner:
        prompts = [runner.prompt_ids(messages=[{"role": "user", "content": question}]) for question in QUESTIONS]
        edge = [runner.generate(prompt_ids, params).text for prompt_ids in prompts]
    assert edge == cloud
    assert len(set(edge)) > len(QUESTIONS) // 2 and all(edge)
