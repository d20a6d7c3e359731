"""The laws on the real graphs: batching, chunking and company change no answer, to the token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse.engine.errors import InvalidRequest, TamperedError
from stillhouse.engine.model import LanguageModel
from stillhouse.engine.options import EngineOptions
from stillhouse.engine.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
QUESTIONS = [
    "What is the capital of France?",
    "Hello",
    "Write one sentence about the sea, and then one about the mountains, please.",
    "How do I return a parcel that I bought three weeks ago, without the receipt, from abroad? " * 4,
    "Count from one to ten.",
    "你好，世界 🌍",
]


@pytest.fixture(scope="module", params=["support-int4", "support-int8"])
def directory(request: pytest.FixtureRequest, support_repository: Path) -> Path:
    return support_repository / request.param / "1"


@pytest.fixture(scope="module")
def model(directory: Path) -> Iterator[LanguageModel]:
    with LanguageModel.load(directory, EngineOptions(max_num_seqs=6, max_model_len=512)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def prompts(model: LanguageModel) -> list[list[int]]:
    return [model.prompt_ids(messages=[{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.fixture(scope="module")
def alone(model: LanguageModel, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """Each answer, with nothing else running, its prompt prefilled in one piece."""
    assert max(map(len, prompts)) <= model.engine.limits.prefill_chunk_tokens
    return [model.generate(prompt, GREEDY).token_ids for prompt in prompts]


def test_batched_answers_are_those_given_alone(
    model: LanguageModel, prompts: list[list[int]], alone: list[tuple[int, ...]]
) -> None:
    streams = [model.stream(prompt, GREEDY) for prompt in prompts * 2]
    answers = [tuple(token for chunk in stream for token in chunk.token_ids) for stream in streams]
    assert answers == alone * 2


@pytest.mark.parametrize("chunk", [7, 32])
def test_a_prompt_in_chunks_gives_the_answer_of_the_whole(
    directory: Path, prompts: list[list[int]], alone: list[tuple[int, ...]], chunk: int
) -> None:
    options = EngineOptions(max_num_seqs=6, max_model_len=512, prefill_chunk_tokens=chunk)
    with LanguageModel.load(directory, options, verify=False) as chunked:
        streams = [chunked.stream(prompt, GREEDY) for prompt in prompts]
        assert [tuple(token for c in stream for token in c.token_ids) for stream in streams] == alone


def test_a_seeded_sample_is_the_same_whatever_else_runs(model: LanguageModel, prompts: list[list[int]]) -> None:
    seeded = SamplingParams(max_tokens=16, temperature=1.0, top_p=0.95, seed=11, ignore_eos=True)
    expected = model.generate(prompts[0], seeded).token_ids
    company = [model.stream(prompt, GREEDY) for prompt in prompts[1:]]
    assert model.generate(prompts[0], seeded).token_ids == expected
    for stream in company:
        stream.close()  # type: ignore[attr-defined]


def test_the_text_in_pieces_is_the_text_of_the_tokens(model: LanguageModel, prompts: list[list[int]]) -> None:
    chunks = list(model.stream(prompts[5], GREEDY))
    ids = [token for chunk in chunks for token in chunk.token_ids]
    assert "".join(chunk.text for chunk in chunks) == model.tokenizer.decode(ids)
    assert [chunk.num_output_tokens for chunk in chunks] == list(range(1, len(chunks) + 1))
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_a_stop_string_ends_the_text_before_it(model: LanguageModel, prompts: list[list[int]]) -> None:
    whole = model.generate(prompts[2], GREEDY).text
    stop = whole[10:14]
    stopped = model.generate(prompts[2], SamplingParams(max_tokens=24, temperature=0.0, stop=(stop,)))
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"


def test_an_abandoned_stream_frees_its_slot(model: LanguageModel, prompts: list[list[int]]) -> None:
    stream = model.stream(prompts[0], SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True))
    next(stream)
    assert model.stats().running == 1
    stream.close()  # type: ignore[attr-defined]
    assert model.generate(prompts[1], GREEDY).num_output_tokens == 24
    assert (model.stats().running, model.stats().kv_tokens_used) == (0, 0)


def test_a_token_id_beyond_the_vocabulary_is_refused(model: LanguageModel) -> None:
    with pytest.raises(InvalidRequest, match="999999"):
        model.prompt_ids(input_ids=[1, 999999])
    with pytest.raises(InvalidRequest, match="exactly one"):
        model.prompt_ids()


def test_a_changed_byte_is_refused_before_anything_loads(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "m" / "1"
    copy.mkdir(parents=True)
    for file in directory.iterdir():
        if file.name == "model.onnx.data":
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            (copy / file.name).write_bytes(content)
        else:
            (copy / file.name).symlink_to(file)
    with pytest.raises(TamperedError, match=r"model\.onnx\.data"):
        LanguageModel.load(copy)
