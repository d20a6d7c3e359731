"""lm-evaluation-harness, as its users run it, asks the gateway; what it reads out is what the engine says.

It is in no extra, for all that it brings: `pip install lm-eval[api]` somewhere, and name the place in PYTHONPATH.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.edge.serving import open_engines
from stillhouse.engine.model import LanguageModel
from stillhouse.engine.options import EngineOptions
from stillhouse.engine.sampling import SamplingParams
from stillhouse.gateway.server import GatewayServer

completions = pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval is not installed")
instance = pytest.importorskip("lm_eval.api.instance")

QUESTION = "How many days do I have to return an item to Brindlecove?"
PAIRS = [
    *((f"Question: {QUESTION}\nAnswer:", f" {days} days") for days in (30, 47, 60)),
    ("The capital of France is", " Paris"),
    ("The capital of France is", " a city of two million people, called Paris by those who live in it."),
    ("", "Water boils at 100 degrees."),
]
ASKED: Any = {"model": "support-int4", "batch_size": 4}


@pytest.fixture(scope="module")
def url(version_dir: Path) -> Iterator[str]:
    """A gateway with one model alone: lm-eval's remote tokenizer names none."""
    server = GatewayServer("127.0.0.1", 0)
    server.start()
    try:
        server.plug(lambda: open_engines([(version_dir, EngineOptions(max_num_seqs=4, max_model_len=512))]))
        yield f"{server.url}/v1"
    finally:
        server.drain(0.0)


def requests(kind: str, arguments: list[Any]) -> list[Any]:
    return [instance.Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


def own_loglikelihood(engine: LanguageModel, context: str, continuation: str) -> tuple[float, bool]:
    tokenizer = engine.tokenizer
    before = tokenizer.encode(context) or [engine.tokenizer.encode("<|im_start|>")[0]]
    ids = tokenizer.encode(context + continuation) if context else [*before, *tokenizer.encode(continuation)]
    found = engine.generate(ids, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)).prompt_logprobs
    assert found is not None
    scored = found[len(before) - 1 :]
    return sum(token.logprob for token in scored), all(token.rank == 1 for token in scored)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"num_concurrent": 3}, {"tokenized_requests": False}])
def test_its_log_likelihoods_are_the_engines(url: str, engine: LanguageModel, more: dict[str, Any]) -> None:
    model = completions.LocalCompletionsAPI(base_url=f"{url}/completions", max_length=512, **ASKED, **more)
    assert model.tokenizer_backend == "remote"
    told = model.loglikelihood(requests("loglikelihood", PAIRS))
    for (log_likelihood, greedy), pair in zip(told, PAIRS, strict=True):
        own, own_greedy = own_loglikelihood(engine, *pair)
        assert log_likelihood == pytest.approx(own, abs=1e-3)
        assert greedy is own_greedy


@pytest.mark.slow
def test_its_generations_are_the_engines_up_to_where_they_stop(url: str, engine: LanguageModel) -> None:
    until = {"until": ["."], "max_gen_toks": 24, "do_sample": False}
    messages = [{"role": "user", "content": QUESTION}]
    params = SamplingParams(temperature=0.0, max_tokens=24, stop=(".",))
    plain = completions.LocalCompletionsAPI(base_url=f"{url}/completions", max_length=512, **ASKED)
    chat = completions.LocalChatCompletion(base_url=f"{url}/chat/completions", model="support-int4")
    begun = "The capital of France is"
    asked = [(plain, begun, {"text": begun}), (chat, chat.apply_chat_template(messages), {"messages": messages})]
    for model, prompt, own in asked:
        (told,) = model.generate_until(requests("generate_until", [(prompt, until)]), disable_tqdm=True)
        assert told == engine.generate(engine.prompt_ids(**own), params).text
        assert told
