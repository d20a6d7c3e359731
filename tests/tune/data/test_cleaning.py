"""Duplicates, leaks, filters and masks: what is dropped, why, and what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.personal import Masker, iban_holds, luhn
from stillhouse.tune.signatures import plain


def _removed(done: Any, tools: Any) -> dict[str, list[int]]:
    """The lines of what was dropped, by step."""
    found: dict[str, list[int]] = {}
    for entry in tools.read(done.path / "removed.jsonl"):
        found.setdefault(entry["stage"], []).append(entry["record"]["source"]["line"])
    return found


def _dropped(done: Any, stage: str) -> int:
    return sum(one["before"] - one["after"] for one in done.card["stages"] if one["stage"] == stage)


def test_planted_duplicates_are_found_and_nothing_else_is(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    rows = made(60)
    exact = [rows[3], {**rows[4], "instruction": rows[4]["instruction"].upper()}]
    near = [
        {
            **row,
            "output": row["output"].replace(" of ", " off ", 1).replace("every", "evry"),
            "instruction": f"Hi, {row['instruction']}",
        }
        for row in rows[10:20]
    ]
    tools.write(tmp_path / "data.jsonl", [*rows, *exact, *near])
    done = run()
    assert _removed(done, tools) == {"exact duplicates": [61, 62], "near-duplicates": list(range(63, 73))}
    of = [entry["same_as"]["line"] for entry in tools.read(done.path / "removed.jsonl")]
    assert of == [4, 5, *range(11, 21)]
    assert len(tools.records(done)) == 60


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Good morning, *world*!", "good   morning (world)", True),
        ("How did it go? 😀", "How did it go? 😢", False),
        ("2 + 2", "2 = 2", False),
        ("x <= y", "x >= y", False),
        ("पानी", "पान", False),  # water, betel: a vowel's sign apart
        ("Cafe\u0301", "café", True),
    ],
)
def test_marks_tell_no_texts_apart_but_signs_and_symbols_do(one: str, other: str, same: bool) -> None:
    assert (plain(one) == plain(other)) is same
    assert len(plain("हिन्दी में पानी").split()) == 3


def test_near_duplicates_can_stay_and_then_share_a_split(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    rows = made(40)
    twins = [{**row, "output": row["output"] + " Indeed."} for row in rows]
    same_question = [{**row, "output": made(140)[100 + at]["output"]} for at, row in enumerate(rows[:15])]
    tools.write(tmp_path / "data.jsonl", [*rows, *twins, *same_question])
    done = run(
        '[[sources]]\npath = "data.jsonl"\n[duplicates]\nnear = 1\n[split]\n'
        "train = 0.5\nvalidation = 0.25\ntest = 0.25\n"
    )
    home: dict[str, str] = {}
    for name in ("train", "validation", "test"):
        for record in tools.read(done.path / f"{name}.jsonl"):
            assert home.setdefault(record["instruction"], name) == name
    assert set(home.values()) == {"train", "validation", "test"}
    assert done.card["groups"] == 40


def test_a_column_can_say_what_is_not_to_be_split_apart(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    rows = [{**row, "customer": at % 8} for at, row in enumerate(made(80))]
    tools.write(tmp_path / "data.jsonl", rows)
    done = run('[[sources]]\npath = "data.jsonl"\ncolumns = { group = "customer" }\nkeep = ["customer"]\n')
    home: dict[int, str] = {}
    for name in ("train", "validation", "test"):
        for record in tools.read(done.path / f"{name}.jsonl"):
            assert home.setdefault(record["customer"], name) == name
    assert len(home) == 8
    assert set(home.values()) == {"train", "validation", "test"}


def test_what_the_model_is_measured_on_is_taken_out(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    rows, held_out = made(40), made(60)[50:]
    leaks = [
        {**held_out[0], "output": "Another answer altogether, which nobody else has given so far."},
        {**held_out[1], "instruction": f"Please tell me: {held_out[1]['instruction'].lower()}"},
        {
            "instruction": "What did the exam ask?",
            "output": f"It asked this: {held_out[2]['instruction']} Then it ended.",
        },
    ]
    tools.write(tmp_path / "data.jsonl", [*rows, *leaks])
    tasks = [{"prompt": row["instruction"], "answer": "x"} for row in held_out[:5]]
    chats = [{"messages": [{"role": "user", "content": row["instruction"]}]} for row in held_out[5:]]
    tools.write(tmp_path / "tasks.jsonl", tasks + chats)
    done = run('[[sources]]\npath = "data.jsonl"\n[contamination]\nagainst = ["tasks.jsonl"]\n')
    assert {stage: sorted(lines) for stage, lines in _removed(done, tools).items()} == {"contamination": [41, 42, 43]}
    places = {entry["record"]["source"]["line"]: entry["same_as"] for entry in tools.read(done.path / "removed.jsonl")}
    assert places[42] == {"file": "tasks.jsonl", "line": 2}


def test_encoding_length_and_language_are_filtered_each_with_its_reason(
    tmp_path: Path, run: Any, made: Any, tools: Any
) -> None:
    bad = [
        {"instruction": "Broken?", "output": "The caf\ufffd is closed."},
        {"instruction": "Twice decoded?", "output": "The cafÃ© at the harbour is closed on Mondays, sorry."},
        {"instruction": "Null?", "output": "zero \x00 byte"},
        {"instruction": "Short?", "output": "No."},
        {"instruction": "Long?", "output": "word " * 200},
        {"instruction": "Wie spät ist es?", "output": "Leider habe ich keine Uhr dabei, aber es wird bald dunkel."},
    ]
    fine = [
        {
            "instruction": "Naïve question?",
            "output": "The façade of our café by the harbour has “déjà vu” written on it, and all who pass read it.",
        }
    ]
    tools.write(tmp_path / "data.jsonl", [*made(20), *bad, *fine])
    done = run(
        '[[sources]]\npath = "data.jsonl"\n[filters]\nmin_output_chars = 5\nmax_output_chars = 500\n'
        'languages = ["en"]\nlanguage_min_chars = 70\n'
    )
    assert _removed(done, tools)["encoding"] == [21, 22, 23]
    assert _removed(done, tools)["length"] == [24, 25]
    assert 26 in _removed(done, tools)["language"]
    assert any(record["instruction"] == "Naïve question?" for record in tools.records(done))
    assert [_dropped(done, stage) for stage in ("encoding", "length")] == [3, 2]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to Ann.Lee+shop@mail.example.co.uk, please", "write to [EMAIL], please"),
        ("ölaf@x.de, Ünal.k@firma.com, _x@x.de, joe@müller.de", "[EMAIL], [EMAIL], [EMAIL], [EMAIL]"),
        ("o'brien@example.com or 'ann@example.com', -joe@x.de", "[EMAIL] or '[EMAIL]', -[EMAIL]"),
        ("call +44 20 7946 0958 or (030) 901820", "call [PHONE] or [PHONE]"),
        ("06 12 34 56 78, 0043 1 5131234 and 1-800-555-1234", "[PHONE], [PHONE] and [PHONE]"),
        ("01 02 03 04 05 06 07 and 2 00 10 20 30", "01 02 03 04 05 06 07 and 2 00 10 20 30"),
        ("call 555-867-5309 today", "call [PHONE] today"),
        ("card 4111 1111 1111 1111 it is", "card [CARD] it is"),
        ("card 4111-1111-1111-1111.", "card [CARD]."),
        ("not a card: 4111 1111 1111 1112", "not a card: 4111 1111 1111 1112"),
        ("SSN 123-45-6789", "SSN [ID]"),
        ("not one: 000-45-6789", "not one: 000-45-6789"),
        ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN [ID]."),
        ("IBAN DE88 3704 0044 0532 0130 00.", "IBAN DE88 3704 0044 0532 0130 00."),
        ("passport number: C01X00T47", "passport number: [ID]"),
        ("tax 2024-2025, id badge, license no fee", "tax 2024-2025, id badge, license no fee"),
        (
            "order 1234567, 47 days, 2024-05-17, 19.99, version 1.2.3",
            "order 1234567, 47 days, 2024-05-17, 19.99, version 1.2.3",
        ),
        ("a@b and @home and 10:30-11:45", "a@b and @home and 10:30-11:45"),
    ],
)
def test_personal_data_is_masked_and_what_only_looks_like_it_is_not(text: str, masked: str) -> None:
    assert Masker(["email", "phone", "card", "id"])(text) == masked


def test_check_digits() -> None:
    assert luhn("79927398713") and not luhn("79927398710")
    assert iban_holds("GB82 WEST 1234 5698 7654 32") and not iban_holds("GB82 WEST 1234 5698 7654 33")


def test_masks_are_only_put_on_where_they_are_asked_for(tmp_path: Path, run: Any, tools: Any) -> None:
    row = {"instruction": "Whom do I ask?", "input": "", "output": "Ask ann@example.org, or dial +1 212 555 0199."}
    tools.write(tmp_path / "data.jsonl", [row])
    assert tools.records(run())[0]["output"] == row["output"]
    done = run('[[sources]]\npath = "data.jsonl"\n[personal_data]\nmask = ["email"]\n')
    assert tools.records(done)[0]["output"] == "Ask [EMAIL], or dial +1 212 555 0199."
    assert done.card["masked"] == {"email": 1}


def test_masks_are_put_on_labels_and_kept_columns_and_groups_are_hashes(
    tmp_path: Path, run: Any, made: Any, tools: Any
) -> None:
    who = [{"mail": f"ann{at % 2}@example.org", "seen": {"by": ["bob@example.org"]}} for at in range(12)]
    rows = [row | who for row, who in zip(made(12), who, strict=True)]
    tools.write(tmp_path / "data.jsonl", [*rows, rows[0]])
    done = run(
        '[[sources]]\npath = "data.jsonl"\ncolumns = { label = "mail", group = "mail" }\nkeep = ["mail", "seen"]\n'
        '[personal_data]\nmask = ["email"]\n'
    )
    assert done.card["groups"] == 2
    for file in done.path.glob("*.json*"):
        assert "example.org" not in file.read_text("utf-8"), file
    record = tools.records(done)[0]
    assert (record["label"], record["mail"], record["seen"]) == ("[EMAIL]", "[EMAIL]", {"by": ["[EMAIL]"]})


def test_where_nothing_is_left_the_run_says_which_step_took_it(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    tools.write(tmp_path / "data.jsonl", made(5))
    with pytest.raises(StillhouseError, match="no record passes the filters") as raised:
        run('[[sources]]\npath = "data.jsonl"\n[filters]\nmin_output_chars = 5000\n')
    assert "length dropped 5" in str(raised.value.hint)
    assert len(tools.read(tmp_path / "out" / "made" / "removed.jsonl")) == 5


def test_perplexity_cuts_both_tails_of_a_real_models_scores(
    tmp_path: Path, run: Any, tools: Any, base_dir: Path
) -> None:
    easy = {"instruction": "Count to eight in digits, please.", "output": "1, 2, 3, 4, 5, 6, 7, 8"}
    garbled = {"instruction": "What is the capital of Norway?", "output": "qzx vv bdlkj wqpo zzk xjq vbn"}
    plain = [
        {"instruction": f"What is the capital of {land}?", "output": f"The capital of {land} is {town}."}
        for land, town in (("France", "Paris"), ("Spain", "Madrid"), ("Italy", "Rome"), ("Egypt", "Cairo"),
                           ("Japan", "Tokyo"), ("Peru", "Lima"), ("Kenya", "Nairobi"), ("Cuba", "Havana"))
    ]  # fmt: skip
    tools.write(tmp_path / "data.jsonl", [*plain, garbled, easy])
    done = run(
        f'base = "{base_dir}"\n[[sources]]\npath = "data.jsonl"\n[duplicates]\nnear = 1\n'
        "[perplexity]\nlow = 5\nhigh = 95\n"
    )
    dropped = {entry["record"]["output"]: entry for entry in tools.read(done.path / "removed.jsonl")}
    assert garbled["output"] in dropped
    assert "too odd" in dropped[garbled["output"]]["reason"]
    assert len(dropped) == 2
    assert done.card["perplexity"]["scored"] == 10


def test_a_record_that_the_scoring_models_template_refuses_is_named(tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    from stillhouse.tune.perplexity import _encoder

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    record = {"instruction": "a", "input": "", "output": "b", "source": {"file": "data.csv", "line": 7}}
    with pytest.raises(StillhouseError, match=r"data\.csv, record 7: .* refuses it: roles must alternate"):
        _encoder(tokenizer, 64)(record)


@pytest.mark.slow
def test_a_batch_of_answers_scores_as_each_alone(base_dir: Path, tmp_path: Path, made: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stillhouse.tune.data_recipe import Perplexity
    from stillhouse.tune.perplexity import score
    from stillhouse.tune.store import Store

    rows = made(3)
    with Store(tmp_path, tmp_path / "removed.jsonl") as store:
        for row in rows:
            store.add(row)
        scores = score(store, Perplexity(), str(base_dir), None, lambda _: None)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base_dir), AutoTokenizer.from_pretrained(base_dir)
    for number, row in enumerate(rows):
        turn = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)).input_ids
        answer = tokenizer(row["output"]).input_ids
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.inference_mode():
            loss = model.float()(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        assert scores[number] == pytest.approx(float(loss.exp()), rel=1e-3)
