"""Synthetic records: a model behind an OpenAI-compatible API makes them up from templates and examples.

An answer that is no record is asked for again, so many times, and the model is told why. Every answer goes into a
journal beside the dataset's versions before it is used: a run that was stopped or is repeated asks only for what is
missing. Every record is marked with the model, the prompt and its template.
"""

from __future__ import annotations

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse.build.cache import key_of
from stillhouse.engine.errors import UsageError
from stillhouse.tune.data_recipe import DataRecipe, Synthetic
from stillhouse.tune.endpoint import Answer, Endpoint, Stopped
from stillhouse.tune.journal import Journal
from stillhouse.tune.made_up import SCHEMA, NoRecord, request_of, texts_of
from stillhouse.tune.personal import Masker
from stillhouse.tune.records import Record, answer_of, prompt_of, with_texts
from stillhouse.tune.store import Store

_OTHER_SEED = 1_000_003  # between the seeds of an answer and of the one after it


@dataclass(frozen=True, slots=True)
class Wish:
    """One record to be made up: its number, the template's number, the prompt, and its label."""

    number: int
    template: int
    prompt: str
    label: str | None

    def key(self, options: Synthetic) -> str:
        """What the answer depends on."""
        said = {"model", "temperature", "system", "max_tokens", "json_schema"}
        settings = options.model_dump(include=said) | {"number": self.number, "prompt": request_of(self.prompt)}
        return key_of(settings)


def add_synthetic(
    recipe: DataRecipe, store: Store, masker: Masker, journals: Path, endpoint: Endpoint | None = None
) -> dict[str, Any]:
    """Asks for all records that the recipe wishes for and adds those that are records; figures for the card.

    Raises StillhouseError where the endpoint fails; what it answered until then is in the journal.
    """
    options = recipe.synthetic
    if options is None:
        raise ValueError("the recipe asks for no synthetic records")
    wishes = wishes_of(options, store, recipe.seed)
    with Journal(journals / "synthetic.jsonl") as journal, endpoint or Endpoint(options) as asked:
        answers, from_journal = _answers(wishes, options, asked, journal, recipe.seed)
    unusable = 0
    for wish in wishes:
        record = _record(wish, answers[wish.number], options)
        if record is None:
            unusable += 1
        else:
            store.add(with_texts(record, masker))
    prompt_tokens = sum(answer.prompt_tokens for answer in answers.values())
    completion_tokens = sum(answer.completion_tokens for answer in answers.values())
    cost = (prompt_tokens * options.input_price + completion_tokens * options.output_price) / 1e6
    return {
        "model": options.model,
        "asked": len(wishes),
        "from_journal": from_journal,
        "asked_again": sum(answer.again for answer in answers.values()),
        "unusable": unusable,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "cost": round(cost, 6),
    }


def wishes_of(options: Synthetic, store: Store, seed: int) -> list[Wish]:
    """The prompts to be answered: templates in turn, with examples drawn from the records of the label by the seed."""
    import jinja2
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)
    by_label = _numbers_by_label(store)
    wishes = []
    for number, label in enumerate(_labels(options, by_label)):
        dice = random.Random(f"{seed}:{number}")
        pool = by_label.get(label) or [one for numbers in by_label.values() for one in numbers]
        drawn = dice.sample(pool, min(options.examples, len(pool)))
        examples = [
            {"instruction": prompt_of(record), "input": "", "output": answer_of(record)}
            for record in (store[one] for one in drawn)
        ]
        template = number % len(options.prompts)
        try:
            made = environment.from_string(options.prompts[template])
            prompt = made.render(examples=examples, label=label, number=number)
        except jinja2.TemplateError as error:
            raise UsageError(
                f"synthetic.prompts[{template}]: {error}", hint="a template sees examples, label and number"
            ) from None
        wishes.append(Wish(number, template, prompt, label))
    return wishes


def _labels(options: Synthetic, by_label: dict[str | None, list[int]]) -> list[str | None]:
    """The label of every wish; a record gets one only where the recipe speaks of labels."""
    if not options.per_label:
        labels: list[str | None] = [*options.labels] or [None]
        return [labels[number % len(labels)] for number in range(options.count)]
    known = list(options.labels) or sorted(label for label in by_label if label is not None)
    if not known:
        raise UsageError("synthetic: per_label, but no record has a label", hint="say count, or synthetic.labels")
    return [label for label in known for _ in range(options.per_label)]


def _answers(
    wishes: list[Wish], options: Synthetic, endpoint: Endpoint, journal: Journal, seed: int
) -> tuple[dict[int, Answer], int]:
    """An answer for every wish, from the journal or from the endpoint, several at a time; how many the journal had."""
    keys = {wish.number: wish.key(options) for wish in wishes}
    known = {number: answer for number, key in keys.items() if (answer := journal.get(key)) is not None}
    answers = {number: answer for number, answer in known.items() if _is_final(answer, options)}
    from_journal = len(answers)

    def ask(wish: Wish) -> tuple[int, Answer]:
        answer = _asked(wish, known.get(wish.number), options, endpoint, seed + wish.number)
        journal.put(keys[wish.number], answer)
        return wish.number, answer

    with ThreadPoolExecutor(options.parallel) as pool:
        waiting = [pool.submit(ask, wish) for wish in wishes if wish.number not in answers]
        try:
            for done in as_completed(waiting):
                number, answer = done.result()
                answers[number] = answer
        except Stopped:
            raise next(
                error for one in waiting if (error := one.exception()) and not isinstance(error, Stopped)
            ) from None
        finally:
            endpoint.stop()
            pool.shutdown(cancel_futures=True)
    return answers, from_journal


def _asked(wish: Wish, known: Answer | None, options: Synthetic, endpoint: Endpoint, seed: int) -> Answer:
    """The first answer that is a record, or the last that is asked for; its tokens are those of all of them."""
    schema = SCHEMA if options.json_schema else None
    answer = known or endpoint.ask(request_of(wish.prompt), schema, seed)
    while not _is_final(answer, options):
        again = answer.again + 1
        other = endpoint.ask(request_of(wish.prompt, _fault_of(answer, options)), schema, seed + again * _OTHER_SEED)
        answer = replace(
            other,
            prompt_tokens=answer.prompt_tokens + other.prompt_tokens,
            completion_tokens=answer.completion_tokens + other.completion_tokens,
            again=again,
        )
    return answer


def _is_final(answer: Answer, options: Synthetic) -> bool:
    return answer.again >= options.corrections or _fault_of(answer, options) is None


def _fault_of(answer: Answer, options: Synthetic) -> str | None:
    """Why an answer is no record; None where it is one."""
    try:
        texts_of(answer.text)
    except NoRecord as fault:
        return f"it was cut off after {options.max_tokens} tokens: be shorter" if answer.cut else str(fault)
    return None


def _record(wish: Wish, answer: Answer, options: Synthetic) -> Record | None:
    """The record in an answer, marked; None where it holds none."""
    try:
        texts = texts_of(answer.text)
    except NoRecord:
        return None
    mark = {
        "model": options.model,
        "template": wish.template,
        "prompt": wish.prompt,
        "prompt_sha256": hashlib.sha256(wish.prompt.encode()).hexdigest(),
    }
    label = {"label": wish.label} if wish.label is not None else {}
    record: Record = {**texts, **label, "synthetic": mark}
    return record | {"source": {"file": f"synthetic:{options.model}", "row": wish.number + 1}}


def _numbers_by_label(store: Store) -> dict[str | None, list[int]]:
    found: dict[str | None, list[int]] = {}
    for number, record in store.living():
        found.setdefault(record.get("label"), []).append(number)
    return found
