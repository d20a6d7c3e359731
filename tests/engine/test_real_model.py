"""The laws on the real graphs: batching, chunking and company change no answer, to the token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.engine.directory import open_version
from stillhouse.engine.errors import InvalidRequest, PromptTooLong, TamperedError
from stillhouse.engine.grammar import GrammarCompiler
from stillhouse.engine.model import LanguageModel
from stillhouse.engine.options import EngineOptions
from stillhouse.engine.runner import OrtRunner
from stillhouse.engine.sampling import SamplingParams, parse_params

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
QUESTIONS = [
    "What is the capital of France?",
    "Hello",
    "Write one sentence about the sea, and then one about the mountains, please.",
    "How do I return a parcel that I bought three weeks ago, without the receipt, from abroad? " * 4,
    "Count from one to ten.",
    "你好，世界 🌍",
]


@pytest.fixture(scope="module", params=["support-int4", pytest.param("support-int8", marks=pytest.mark.slow)])
def directory(request: pytest.FixtureRequest, support_repository: Path) -> Path:
    return support_repository / request.param / "1"


@pytest.fixture(scope="module")
def model(directory: Path) -> Iterator[LanguageModel]:
    options = EngineOptions(max_num_seqs=6, max_model_len=512, prefix_slots=0)
    with LanguageModel.load(directory, options) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def prompts(model: LanguageModel) -> list[list[int]]:
    return [model.prompt_ids(messages=[{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.fixture(scope="module")
def alone(model: LanguageModel, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """Each answer, with nothing else running, its prompt prefilled in one piece."""
    assert max(map(len, prompts)) <= model.engine.limits.prefill_chunk_tokens
    return [model.generate(prompt, GREEDY).token_ids for prompt in prompts]


@pytest.mark.parametrize("in_company", [True, False])
def test_a_lone_row_with_and_without_company_is_swapped_and_moved_whole(directory: Path, in_company: bool) -> None:
    version = open_version(directory, verify=False)
    runner = OrtRunner(version.model_path, network=version.manifest.network, slots=2, max_len=64)
    several_differ = runner._lone_row_differs
    runner._lone_row_differs = in_company
    prompt = [5, 6, 7, 8, 9]
    runner.prefill(0, prompt, 0)
    runner.prefill(1, prompt, 0)
    pair = runner.decode([10, 10], [5, 5]).copy()
    assert np.array_equal(pair[0], pair[1])
    runner.swap_in(1, runner.swap_out(0, 5))
    runner.release(0)
    runner.copy(1, 0, 5)
    alone = runner.decode([10], [5])[0]
    assert np.array_equal(alone, pair[0]) or (several_differ and not in_company)


def test_rows_of_one_length_on_many_threads_are_computed_as_among_others(directory: Path) -> None:
    version = open_version(directory, verify=False)
    threads = 2 * version.manifest.network.heads + 2
    runner = OrtRunner(version.model_path, network=version.manifest.network, slots=3, max_len=640, threads=threads)
    past = runner.cache._array[:, 1:2, :, :600]  # any keys and values do; slot 0 lies behind the spare one
    past[...] = np.random.default_rng(0).standard_normal(past.shape, np.float32)
    for slot, length in ((1, 600), (2, 599)):
        runner.copy(0, slot, length)
    among_others = runner.decode([10, 10, 10], [600, 600, 599])[0].copy()
    for rows in (1, 2):
        assert np.array_equal(runner.decode([10] * rows, [600] * rows)[0], among_others)


def test_one_slot_is_enough_for_a_row_in_company(directory: Path) -> None:
    version = open_version(directory, verify=False)
    runner = OrtRunner(version.model_path, network=version.manifest.network, slots=1, max_len=64)
    runner._lone_row_differs = True
    runner.prefill(0, [5, 6, 7], 0)
    assert np.isfinite(runner.decode([8], [3])).all()
    assert runner.decode([9], [4]).shape == (1, version.manifest.network.vocab_size)


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


def test_an_answer_survives_preemption_to_the_token(
    directory: Path, prompts: list[list[int]], alone: list[tuple[int, ...]]
) -> None:
    """In a third of the memory that all would need: their KV is swapped out and back, not computed again."""
    per_token = open_version(directory, verify=False).manifest.memory.kv_bytes_per_token
    options = EngineOptions(max_num_seqs=6, max_model_len=160, kv_cache_bytes=170 * per_token, prefix_slots=0)
    with LanguageModel.load(directory, options, verify=False) as small:
        streams = [small.stream(prompt, GREEDY) for prompt in prompts]
        assert [tuple(token for c in stream for token in c.token_ids) for stream in streams] == alone
        assert small.stats().preemptions_total > 0


def test_a_reused_prefix_changes_no_token(directory: Path, prompts: list[list[int]]) -> None:
    """Behind a shared system prompt, kept from the request before: the same answers as without reuse."""
    system = prompts[3]
    answers = []
    for prefix_slots in (0, 2):
        options = EngineOptions(max_num_seqs=2, max_model_len=512, prefix_slots=prefix_slots)
        with LanguageModel.load(directory, options, verify=False) as model:
            answers.append([model.generate(system + prompt, GREEDY).token_ids for prompt in prompts[:3]])
            assert (model.stats().prefix_tokens_total > 0) == (prefix_slots > 0)
    assert answers[0] == answers[1]


def test_prompt_logprobs_are_those_of_one_by_one_scoring(model: LanguageModel, prompts: list[list[int]]) -> None:
    """A token's log-probability does not depend on what follows it in the prompt."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=3)
    whole = model.generate(prompts[0], params).prompt_logprobs
    begun = model.generate(prompts[0][:12], params).prompt_logprobs
    assert whole is not None
    assert begun is not None
    assert len(whole) == len(prompts[0]) - 1
    for one, other in zip(begun, whole, strict=False):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[0-9]{3}-[0-9]{4}"}, r"[0-9]{3}-[0-9]{4}"),
        ({"choice": ["red", "green"]}, "red|green"),
        ({"choice": [f"no. {at}?" for at in range(10_000)]}, r"no\. [0-9]+\?"),
        (
            {
                "json": {
                    "type": "object",
                    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
                    "required": ["a"],
                    "additionalProperties": False,
                }
            },
            r'\{\s*"a"\s*:\s*-?\d+\s*\}',
        ),
        ({"grammar": 'start: "ab" /[0-9]{2}/ "."'}, r"ab[0-9]{2}\."),
    ],
)
def test_an_answer_has_the_form_that_was_asked_for(
    model: LanguageModel, prompts: list[list[int]], form: dict[str, object], pattern: str
) -> None:
    """Greedy, and at a temperature that would say anything (in JSON: any amount of white space)."""
    for temperature in (0.0,) if "json" in form else (0.0, 2.0):
        asked = parse_params({"max_tokens": 60, "temperature": temperature, "seed": 1, "structured_outputs": form})
        answer = model.generate(prompts[0], asked)
        assert re.fullmatch(pattern, answer.text.strip()), answer.text
        assert answer.finish_reason == "stop"


def test_the_answers_of_one_request_have_its_form_each_for_itself(
    model: LanguageModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled once, whatever there is of answers: a grammar may take a second."""
    compiled = []
    compile_form = GrammarCompiler.compile
    monkeypatch.setattr(GrammarCompiler, "compile", lambda *given: compiled.append(given) or compile_form(*given))
    params = parse_params({"n": 3, "temperature": 2.0, "seed": 1, "structured_outputs": {"regex": "[0-9]{3}-[a-z]{4}"}})
    answers = model.generate_all(prompts[0], params)
    assert all(re.fullmatch("[0-9]{3}-[a-z]{4}", answer.text) for answer in answers)
    assert len({answer.text for answer in answers}) == 3
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ({"regex": "("}, r"structured_outputs\.regex is not valid"),
        ({"regex": "\ud800"}, r"structured_outputs\.regex is not valid"),
        ({"json": {"$ref": "#"}}, "nothing fits the grammar"),
        ({"grammar": "start: start"}, "nothing fits the grammar"),
        ({"choice": [str(at) for at in range(10_001)]}, "10001 choices, at most 10000"),
        ({"regex": "a" * 300_000}, "300000 long"),
    ],
)
def test_a_broken_grammar_is_refused_by_name(
    model: LanguageModel, prompts: list[list[int]], form: dict[str, object], named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named) as refused:
        model.generate(prompts[0], parse_params({"structured_outputs": form}))
    assert "\n" not in str(refused.value)


def test_a_text_that_cannot_fit_is_refused_before_it_is_read(model: LanguageModel) -> None:
    text = "a" * 10_000_000
    for asked in ({"text": text}, {"messages": [{"role": "user", "content": text}]}):
        with pytest.raises(PromptTooLong, match="the context holds"):
            model.prompt_ids(**asked)  # type: ignore[arg-type]


def test_n_answers_share_a_prompt_and_differ_by_their_seeds(model: LanguageModel, prompts: list[list[int]]) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=12, temperature=1.0, ignore_eos=True)
    answers = model.generate_all(prompts[2], params)
    singly = [model.generate(prompts[2], replace(params, n=1, seed=5 + index)).token_ids for index in range(3)]
    assert [answer.token_ids for answer in answers] == singly
    assert len(set(singly)) == 3


def test_a_seeded_sample_is_the_same_whatever_else_runs(model: LanguageModel, prompts: list[list[int]]) -> None:
    seeded = SamplingParams(max_tokens=16, temperature=1.0, top_p=0.95, seed=11, ignore_eos=True)
    expected = model.generate(prompts[0], seeded).token_ids
    company = [model.stream(prompt, GREEDY) for prompt in prompts[1:]]
    assert model.generate(prompts[0], seeded).token_ids == expected
    for stream in company:
        stream.close()


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(len(QUESTIONS))), steps=st.integers(0, 12))
def test_to_cancel_one_at_any_moment_changes_no_other(
    model: LanguageModel, prompts: list[list[int]], alone: list[tuple[int, ...]], order: list[int], steps: int
) -> None:
    streams = {at: model.stream(prompts[at], GREEDY) for at in order}
    victim = streams.pop(order[0])
    for _ in range(steps):
        next(victim)
    victim.close()
    answers = {at: tuple(token for chunk in stream for token in chunk.token_ids) for at, stream in streams.items()}
    assert answers == {at: alone[at] for at in streams}


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
    stream.close()
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
