"""A fine-tune of the tiny base: trained, killed and resumed, refused by name, and taken by peft and by the build."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.build.adapter import open_adapter
from stillhouse.build.checkpoint import open_checkpoint
from stillhouse.build.recipe import AdapterRef
from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune.finetune import tune
from stillhouse.tune.settings import load_tune_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
Recipe = Callable[..., Path]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
# What the fixture `tuned` was trained with.
FAST = "epochs = 4\nbatch_size = 4\nlearning_rate = 5e-3\nr = 4\nalpha = 8"


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))


def curve(card: dict[str, Any]) -> list[float]:
    return [loss for _, loss in card["curves"]["train"]] + [row[1] for row in card["curves"]["validation"]]


def test_the_tuned_model_knows_more_than_the_base_and_the_card_says_so(tuned: tuple[Path, dict[str, Any]]) -> None:
    folder, card = tuned
    assert card["after"]["test"]["loss"] < card["before"]["test"]["loss"] - 0.5
    assert len(card["curves"]["train"]) == card["steps"] == 48
    assert card["best_step"] in [step for step, _, _ in card["curves"]["validation"]]
    assert card["targets"]["validation_share"]["reached"] is True
    assert card["targets"]["training_loss"]["reached"] is False  # of a random base in 48 steps
    assert card["data"]["train"]["records"] == 48
    assert {"card.json", "README.md", "loss.png", "adapter_config.json", "adapter_model.safetensors"} == {
        file.name for file in folder.iterdir()
    }
    readme = (folder / "README.md").read_text("utf-8")
    assert f"{card['after']['validation']['perplexity']:.3f}" in readme
    assert list((folder.parent / "adapter-runs").glob("*/tensorboard/events*"))


def test_plain_peft_loads_the_adapter_and_finds_the_loss_that_the_card_names(
    tuned: tuple[Path, dict[str, Any]], tiny_base: Path, dataset: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, card = tuned
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), folder)
    total = tokens = 0.0
    for line in (dataset / "validation.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": record["instruction"]}], tokenize=False, add_generation_prompt=True
        )
        before = tokenizer.encode(prompt, add_special_tokens=False)
        answer = [*tokenizer.encode(record["output"], add_special_tokens=False), tokenizer.eos_token_id]
        ids = torch.tensor([before + answer])
        with torch.no_grad():
            rows = model(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
        total -= float(rows.gather(1, torch.tensor(answer)[:, None]).sum())
        tokens += len(answer)
    assert total / tokens == pytest.approx(card["after"]["validation"]["loss"], abs=1e-4)


def test_the_build_takes_the_folder_as_it_is(
    tuned: tuple[Path, dict[str, Any]], tiny_base: Path, tmp_path: Path
) -> None:
    from stillhouse.build.merge import merge

    adapter = open_adapter(AdapterRef(path=str(tuned[0])), open_checkpoint(str(tiny_base)))
    record = merge(
        lambda _: None,
        base=str(tiny_base),
        adapters=[{"path": str(adapter.path), "weight": 1.0}],
        probe_texts=["What is five?"],
        destination=str(tmp_path / "merged"),
    )
    assert record["modules_changed"]


def test_the_same_recipe_does_nothing_a_second_time_and_another_does_not_overwrite(
    tuned: tuple[Path, dict[str, Any]],
) -> None:
    folder, card = tuned
    recipe = folder.parent / "recipe.toml"
    again = tune(load_tune_recipe(recipe))
    assert again is not None and again[2] is False and again[1] == card
    recipe_text = recipe.read_text("utf-8")
    other = recipe.with_name("other.toml")
    other.write_text(recipe_text.replace("r = 4", "r = 2"), "utf-8")
    with pytest.raises(UsageError, match="exists and was made from other inputs"):
        tune(load_tune_recipe(other))


def test_forced_the_same_recipe_is_trained_again_to_the_same_adapter(write_tune_recipe: Recipe) -> None:
    recipe = load_tune_recipe(write_tune_recipe("epochs = 1\nbatch_size = 8\nr = 2\nlearning_rate = 5e-3"))
    first = tune(recipe)
    assert first is not None
    folder, runs = first[0], first[0].parent / "adapter-runs"
    before = weights(folder)
    again = tune(recipe, force=True)
    assert again is not None and again[2]
    assert len(list(runs.glob("*/checkpoint-6/whole"))) == 2  # two runs, each trained to its end
    assert curve(again[1]) == pytest.approx(curve(first[1]), abs=1e-5)
    for name, value in before.items():
        assert weights(folder)[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize(
    "moments",
    [
        ("checkpoint-20/*",),  # while a checkpoint is being written
        ("checkpoint-5/*", "checkpoint-15/whole", "checkpoint-48/trainer_state.json"),
    ],
)
@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_curve_and_the_same_adapter(
    moments: tuple[str, ...], tuned: tuple[Path, dict[str, Any]], write_tune_recipe: Recipe
) -> None:
    recipe = write_tune_recipe(FAST + "\nsave_every_steps = 5\n")
    runs = recipe.parent / "adapter-runs"
    command = [sys.executable, "-m", "stillhouse.cli.main", "tune", str(recipe)]
    for moment in moments:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ONE_THREAD)
        deadline = time.monotonic() + 120
        while not list(runs.glob(f"*/{moment}")) and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        _, stderr = child.communicate()
        assert child.returncode == -signal.SIGKILL, stderr.decode()
        assert not (recipe.parent / "adapter").exists()
    done = tune(load_tune_recipe(recipe))
    assert done is not None
    assert curve(done[1]) == pytest.approx(curve(tuned[1]), abs=1e-5)
    assert done[1]["before"] == tuned[1]["before"]
    for name, value in weights(tuned[0]).items():
        assert weights(done[0])[name] == pytest.approx(value, abs=1e-6), name


def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(write_tune_recipe: Recipe) -> None:
    wild = (
        "epochs = 30\nbatch_size = 4\nlearning_rate = 0.9\nwarmup = 0.5\nsave_every_steps = 3\ndivergence_window = 6\n"
    )
    recipe = write_tune_recipe(wild + 'schedule = "linear"\nclip = 100.0\npatience = 0\n')
    with pytest.raises(StillhouseError, match="diverged: the training loss") as stopped:
        tune(load_tune_recipe(recipe))
    good = Path(str(stopped.value).rpartition("kept: ")[2])
    assert (good / "adapter_model.safetensors").is_file()
    history = json.loads((good / "trainer_state.json").read_text("utf-8"))["log_history"]
    assert history[-1]["step"] < 360
    assert not (recipe.parent / "adapter").exists()
    assert (good.parent / "loss.png").is_file()


def test_a_run_without_progress_ends_early_and_its_best_step_is_the_result(write_tune_recipe: Recipe) -> None:
    recipe = write_tune_recipe(
        "epochs = 40\nbatch_size = 8\nlearning_rate = 5e-2\nr = 4\npatience = 1\ndivergence_rise = 100.0"
    )
    done = tune(load_tune_recipe(recipe))
    assert done is not None
    card = done[1]
    assert "not improved 1 times" in card["stopped"]
    assert card["best_step"] < card["steps"] < 240
    assert card["after"]["validation"]["loss"] == pytest.approx(min(row[1] for row in card["curves"]["validation"]))


@pytest.mark.slow
def test_a_full_disk_is_a_line_and_leaves_no_half_adapter(write_tune_recipe: Recipe) -> None:
    recipe = write_tune_recipe()
    program = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); "
    program += "from stillhouse.cli.main import run; sys.exit(run(sys.argv[1:]))"
    ran = subprocess.run(
        [sys.executable, "-c", program, "tune", str(recipe)],
        capture_output=True,
        text=True,
        check=False,
        env=ONE_THREAD,
    )
    assert ran.returncode == 1
    errors = [line for line in ran.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(errors) == 2 and "Traceback" not in ran.stderr
    assert "disk" in errors[1]
    assert not (recipe.parent / "adapter").exists()


def test_a_run_goes_on_from_an_earlier_adapter(tuned: tuple[Path, dict[str, Any]], write_tune_recipe: Recipe) -> None:
    recipe = write_tune_recipe(f'start_from = "{tuned[0]}"\nepochs = 1\nlearning_rate = 1e-3')
    done = tune(load_tune_recipe(recipe))
    assert done is not None
    assert done[1]["before"]["validation"] == pytest.approx(tuned[1]["after"]["validation"], rel=1e-4)
    assert done[1]["start_from"] == "adapter"


@pytest.mark.parametrize(
    "kind",
    [
        "packing = true\nmax_length = 128",
        "rslora = true\ndora = true",
        'targets = "all-linear"\naccumulation = 2',
        pytest.param('mixed_precision = "bf16"\ngradient_checkpointing = true\ndevice = "cpu"', marks=pytest.mark.slow),
    ],
)
def test_other_kinds_of_lora_learn_too(kind: str, write_tune_recipe: Recipe) -> None:
    done = tune(load_tune_recipe(write_tune_recipe(f"epochs = 2\nlearning_rate = 5e-3\nbatch_size = 4\n{kind}")))
    assert done is not None
    assert done[1]["after"]["validation"]["loss"] < done[1]["before"]["validation"]["loss"] - 0.3


@pytest.mark.slow
def test_a_record_of_weight_zero_teaches_nothing_and_equal_weights_change_nothing(
    write_tune_recipe: Recipe, dataset: Path, tmp_path: Path
) -> None:
    lines = (dataset / "train.jsonl").read_text("utf-8").splitlines()
    settings = "epochs = 1\nlearning_rate = 5e-3\nbatch_size = 4"
    found = {}
    for name, weights in (("none", [None] * 48), ("equal", [1 + 1e-9] * 48), ("zero", [0] * 48)):
        rows = [
            json.loads(line) | ({} if weight is None else {"weight": weight})
            for line, weight in zip(lines, weights, strict=True)
        ]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        (folder / "validation.jsonl").write_bytes((dataset / "validation.jsonl").read_bytes())
        done = tune(load_tune_recipe(write_tune_recipe(settings, data=f'data = "{folder}"')))
        assert done is not None
        found[name] = done[1]["after"]["validation"]["loss"]
    assert found["equal"] == pytest.approx(found["none"], abs=1e-4)
    assert found["zero"] == pytest.approx(done[1]["before"]["validation"]["loss"], abs=1e-4)
    assert found["none"] < found["zero"] - 0.3


@pytest.mark.slow
def test_two_processes_train_the_adapter_that_one_trains_on_batches_twice_as_large(write_tune_recipe: Recipe) -> None:
    alike = "epochs = 2\nlearning_rate = 5e-3\ndropout = 0.0\nr = 4\n"
    one, two = (write_tune_recipe(alike + f"batch_size = {size}") for size in (8, 4))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "stillhouse.cli.main", "tune", str(two)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("adapter, card and curves") == 1
    done = tune(load_tune_recipe(one))
    assert done is not None
    card = json.loads((two.parent / "adapter" / "card.json").read_text("utf-8"))
    assert card["machine"]["processes"] == 2
    assert curve(card) == pytest.approx(curve(done[1]), abs=1e-4)
