"""Settings that make no sense are refused by name, before a weight is loaded; records become what is served."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.engine.text import Tokenizer
from stillhouse.tune import checkpoints, watch
from stillhouse.tune.encoding import Encoder, Example, collate, pack
from stillhouse.tune.finetune import prepare
from stillhouse.tune.settings import load_tune_recipe
from stillhouse.tune.splits import read_split

RECORD = {"instruction": "What is six?", "input": "", "output": "The number 6."}


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> Any:
    """Writes a recipe with `settings` in [tune] beside a train and a validation file."""
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(RECORD) + "\n", "utf-8")

    def write(settings: str, *, files: str = 'train = "train.jsonl"\nvalidation = "validation.jsonl"') -> Path:
        file = tmp_path / "recipe.toml"
        file.write_text(f'base = "{tiny_base}"\n[tune]\n{files}\n{settings}\n', "utf-8")
        return file

    return write


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("rank = 8", "unknown key 'tune.rank'"),
        ("r = 0", "tune.r"),
        ("dropout = 1.0", "tune.dropout"),
        ("learning_rate = 2", "tune.learning_rate"),
        ("learning_rate = nan", "tune.learning_rate"),
        ("clip = inf", "tune.clip"),
        ("epochs = 1.5", "tune.epochs"),
        ('targets = ["all-linear", "q_proj"]', "stands alone"),
        ('targets = ["q_proj", "q_proj"]', "each module once"),
        ('targets = "most"', "tune.targets"),
        ('mixed_precision = "fp16"\ndevice = "cpu"', "fp16 needs a GPU"),
        ('qlora = true\ndevice = "cpu"', "qlora needs a GPU"),
        ('start_from = "earlier"\nr = 8', "leave r out"),
        ('data = "."', "give one or the other"),
        ("divergence_window = 1", "tune.divergence_window"),
        ('schedule = "random"', "tune.schedule"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused_by_name(settings: str, words: str, recipe: Any) -> None:
    with pytest.raises(UsageError) as refused:
        load_tune_recipe(recipe(settings))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ("", "no data"),
        ('train = "train.jsonl"', "early stopping needs validation data"),
        ('train = "train.jsonl"\npatience = 0\nevaluate_every_steps = 2', "evaluate_every_steps without validation"),
        ('train = "none.jsonl"\nvalidation = "validation.jsonl"', "tune.train: no such file"),
        ('data = "nowhere"', "tune.data: no such folder"),
    ],
)
def test_data_that_is_not_there_is_refused(files: str, words: str, recipe: Any) -> None:
    with pytest.raises(UsageError) as refused:
        load_tune_recipe(recipe("", files=files))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("max_length = 4096", "the base's context is 2048"),
        ('targets = ["c_attn"]', "has no 'c_attn'"),
        ("r = 512", "more than the base's width"),
        ("evaluate_every_steps = 50", "but the whole run has 3 steps"),
        ("save_every_steps = 50", "but the whole run has 3 steps"),
        ("max_length = 8", "all 1 examples are longer than max_length = 8"),
        ('start_from = "."', "is no adapter"),
    ],
)
def test_what_base_and_data_do_not_allow_is_refused_before_the_model_is_loaded(
    settings: str, words: str, recipe: Any
) -> None:
    with pytest.raises(StillhouseError) as refused:
        prepare(load_tune_recipe(recipe(settings)))
    assert words in str(refused.value)


def test_the_defaults_are_the_practices(recipe: Any) -> None:
    options = load_tune_recipe(recipe("")).tune
    assert (options.r, options.alpha, options.dropout, options.targets) == (16, 32, 0.1, ["q_proj", "v_proj"])
    assert (options.learning_rate, options.clip, options.patience) == (2e-5, 1.0, 2)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        pytest.param('{"a": ' + "1" * 5000 + "}", "line 2 is not JSON", id="digits"),
        pytest.param("[" * 100_000, "line 2 is not JSON", id="depth"),
        ("[]", "record 2 is no JSON object"),
        ('{"instruction": "?", "output": ""}', "record 2 has no answer"),
        ('{"instruction": "", "output": "x"}', "nothing is asked"),
        ('{"instruction": 3, "output": "x"}', "no text"),
        ('{"messages": [{"role": "user"}]}', "record 2 has messages"),
        ('{"messages": [{"role": "user", "content": "?"}]}', "record 2 has no answer"),
    ],
)
def test_a_record_that_cannot_be_learnt_is_named_by_its_number(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(RECORD) + "\n" + line + "\n", "utf-8")
    with pytest.raises(StillhouseError, match=words.replace("[", r"\[")):
        read_split(file, "train")


def test_a_mark_before_the_first_record_is_no_part_of_it(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(RECORD) + "\n", "utf-8-sig")
    assert len(read_split(file, "train").conversations) == 1


def test_parquet_is_read_as_jsonl_is_and_a_cut_one_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    file, lines = tmp_path / "train.parquet", tmp_path / "train.jsonl"
    parquet.write_table(pa.Table.from_pylist([RECORD, RECORD]), file)
    lines.write_text((json.dumps(RECORD) + "\n") * 2, "utf-8")
    assert read_split(file, "train").conversations == read_split(lines, "train").conversations
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(StillhouseError, match="cannot read"):
        read_split(file, "train")


def test_an_example_is_the_prompt_as_it_is_served_and_an_answer_that_ends(tiny_base: Path) -> None:
    text = Tokenizer(tiny_base)
    conversation = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2."},
    ]
    first, second = Encoder(text, [2]).examples(conversation)
    served = text.encode(text.render_chat(conversation[:3]), add_special_tokens=False)
    assert second.prompt == served
    assert second.answer == [*text.encode("2.", add_special_tokens=False), 2]
    assert text.decode(first.answer) == "1."


@pytest.mark.parametrize(
    ("answer", "learnt"),
    [("42.", "\n</think>\n\n42."), ("<think>\n6 × 7</think>\n\n42.", "6 × 7</think>\n\n42.")],
)
def test_behind_a_thought_that_the_template_opens_the_answer_closes_it(
    answer: str, learnt: str, tiny_base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "thinks"
    shutil.copytree(tiny_base, folder)
    template = folder / "chat_template.jinja"
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n"
    template.write_text(template.read_text("utf-8").replace(prompt, prompt + "<think>\n"), "utf-8")
    text = Tokenizer(folder)
    asked = {"role": "user", "content": "6 × 7?"}
    (example,) = Encoder(text, [2]).examples([asked, {"role": "assistant", "content": answer}])
    assert text.decode(example.prompt).endswith("<think>\n")
    assert text.decode(example.answer) == learnt


def test_packed_examples_are_whole_and_see_nothing_of_each_other(tiny_base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    examples = [Example(list(range(5, 5 + size)), list(range(50, 53))) for size in (2, 9, 4, 7, 3)]
    groups = pack(examples, 20, seed=1)
    assert all(sum(map(len, group)) <= 20 for group in groups)
    assert len(groups) < len(examples)
    assert sorted(map(len, (example for group in groups for example in group))) == sorted(map(len, examples))
    assert pack(examples, 20, seed=1) == groups
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        together = model(**collate([examples])).loss
        alone = [float(model(**collate([[example]])).loss) for example in examples]
    assert float(together) == pytest.approx(math.fsum(alone) / len(alone), abs=1e-5)


def test_a_record_whose_weight_is_null_counts_as_any_other(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(RECORD | {"weight": None}) + "\n" + json.dumps(RECORD | {"weight": 3}), "utf-8")
    assert read_split(file, "train").weights == [1.0, 3.0]


def test_a_record_that_the_template_refuses_is_named_by_file_and_number(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "strict"
    shutil.copytree(tiny_base, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system turn') }}"
        "{% endif %}{{ message.content }}{% endfor %}",
        "utf-8",
    )
    file = tmp_path / "train.jsonl"
    turns = [("system", "Be kind."), ("user", "?"), ("assistant", "!")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    file.write_text(json.dumps(RECORD) + "\n\n" + json.dumps(chat) + "\n", "utf-8")
    with pytest.raises(StillhouseError, match=r"train\.jsonl: record 3: .*no system turn"):
        Encoder(Tokenizer(folder), [2]).split(read_split(file, "train"))


def test_other_arithmetic_or_more_processes_are_other_inputs(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = load_tune_recipe(recipe("", files='train = "train.jsonl"\npatience = 0'))
    Path(asked.tune.train or "").write_text((json.dumps(RECORD) + "\n") * 4, "utf-8")
    alone = prepare(asked).inputs
    monkeypatch.setenv("RANK", "0")
    assert prepare(asked).inputs == alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert prepare(asked).inputs != alone


def verdict(history: watch.History, **settings: Any) -> watch.Verdict | None:
    judge = watch.Judge(**settings)
    for row in history:
        judge.read(row)
    return judge.verdict


def rows(values: list[float], **more: Any) -> list[dict[str, Any]]:
    return [{"step": at, "loss": value, **more} for at, value in enumerate(values, 1)]


def test_a_loss_that_rises_over_a_window_is_a_divergence_and_noise_is_none() -> None:
    falling = [3.0 - 0.02 * step + (0.4 if step % 7 == 0 else 0.0) for step in range(100)]
    settings: dict[str, Any] = {"patience": 2, "window": 10, "rise": 0.5}
    assert verdict(rows(falling), **settings) is None
    found = verdict(rows([*falling, *([2.5] * 10)]), **settings)
    assert found is not None and found.kind == "diverged" and 90 <= found.good_step <= 100
    # Row by row it finds the first window that rose so far, as looking at all of the history does.
    losses = [*falling, *([2.5] * 10)]
    means = [math.fsum(losses[at : at + 10]) / 10 for at in range(len(losses) - 9)]
    at = next(at for at in range(10, len(means)) if means[at] - min(means[: at - 9]) > 0.5)
    assert found.reason.endswith(f"to {means[at]:.3f} (to step {at + 10})")
    assert found.good_step == means.index(min(means[: at - 9])) + 10
    assert watch.calm_step(rows([*falling, 2.5]), 10) >= 90


@pytest.mark.parametrize("key", ["loss", "grad_norm", "eval_loss"])
def test_a_figure_that_is_not_finite_is_a_divergence(key: str) -> None:
    history = [*rows([1.0, 1.0]), {"step": 3, key: float("nan")}]
    found = verdict(history, patience=2, window=10, rise=0.5)
    assert found is not None and found.kind == "diverged" and found.good_step == 2
    without = verdict(history, patience=2, window=10, rise=0.5, gradients=False)
    assert (without is None) == (key == "grad_norm")


def test_a_run_ends_early_when_the_validation_loss_was_not_improved_for_the_patience() -> None:
    history = [{"step": 10 * at, "eval_loss": loss} for at, loss in enumerate([1.0, 0.8, 0.9, 0.85], 1)]
    found = verdict(history, patience=2, window=10, rise=0.5)
    assert found is not None and found.kind == "early" and found.good_step == 20
    assert verdict(history[:3], patience=2, window=10, rise=0.5) is None
    assert verdict(history, patience=0, window=10, rise=0.5) is None
    assert watch.best_step(history) == 20


def test_only_whole_checkpoints_count_and_the_asked_for_ones_are_kept(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12, 15):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("w", "utf-8")
        if step != 15:
            checkpoints.mark_whole(folder)
    assert [path.name for path in checkpoints.whole_checkpoints(tmp_path)][-1] == "checkpoint-12"
    checkpoints.drop_half(tmp_path)
    checkpoints.keep(tmp_path, {3})
    assert [checkpoints.step_of(path) for path in checkpoints.whole_checkpoints(tmp_path)] == [3, 9, 12]
    assert checkpoints.last_good(tmp_path, 10) == tmp_path / "checkpoint-9"
    assert checkpoints.last_good(tmp_path, 2) is None
