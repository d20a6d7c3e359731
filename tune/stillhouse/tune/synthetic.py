"""Synthetic records: a model behind an OpenAI-compatible API makes them up from templates and examples.

Every answer goes into a journal beside the dataset's versions before it is used: a run that was stopped or is
repeated asks only for what is missing. Every record is marked with the model, the prompt and its template.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.build.cache import key_of
from stillhouse.engine.errors import UsageError
from stillhouse.tune.data_recipe import DataRecipe, Synthetic
from stillhouse.tune.endpoint import Answer, Endpoint, Stopped
from stillhouse.tune.personal import Masker
from stillhouse.tune.records import Record, answer_of, prompt_of, with_texts
from stillhouse.tune.store import Store

# What a model is held to: one record in three texts.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"instruction": {"type": "string"}, "input": {"type": "string"}, "output": {"type": "string"}},
    "required": ["instruction", "input", "output"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Wish:
    """One record to be made up: its number, the template's number, the prompt, and its label."""

    number: int
    template: int
    prompt: str
    label: str | None

    def key(self, options: Synthetic) -> str:
        """What the answer depends on."""
        settings = {"model": options.model, "temperature": options.temperature, "system": options.system}
        return key_of({**settings, "number": self.number, "prompt": self.prompt, "max_tokens": options.max_tokens})


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
        answers = _answers(wishes, options, asked, journal, recipe.seed)
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
        "from_journal": journal.found,
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


class Journal:
    """Answers by key, a JSON object a line, synced as they come. A torn last line is one answer less."""

    def __init__(self, file: Path) -> None:
        self._lock = threading.Lock()
        self.found = 0
        self._known: dict[str, Answer] = {}
        self._stream = file.open("a+b")
        fcntl.flock(self._stream, fcntl.LOCK_EX)  # another run of the same dataset waits
        self._stream.seek(0)
        whole = 0
        for line in self._stream:
            if not line.endswith(b"\n"):
                self._stream.truncate(whole)
                break
            whole += len(line)
            entry = json.loads(line)
            self._known[entry["key"]] = Answer(entry["text"], entry["prompt_tokens"], entry["completion_tokens"])

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def get(self, key: str) -> Answer | None:
        answer = self._known.get(key)
        self.found += answer is not None
        return answer

    def put(self, key: str, answer: Answer) -> None:
        entry = {
            "key": key,
            "text": answer.text,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
        }
        with self._lock:
            self._known[key] = answer
            self._stream.write(json.dumps(entry).encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())


def _answers(
    wishes: list[Wish], options: Synthetic, endpoint: Endpoint, journal: Journal, seed: int
) -> dict[int, Answer]:
    """An answer for every wish, from the journal or from the endpoint, several at a time."""
    answers: dict[int, Answer] = {}
    missing = []
    for wish in wishes:
        known = journal.get(wish.key(options))
        if known is None:
            missing.append(wish)
        else:
            answers[wish.number] = known

    def ask(wish: Wish) -> tuple[int, Answer]:
        answer = endpoint.ask(wish.prompt, SCHEMA, seed + wish.number)
        journal.put(wish.key(options), answer)
        return wish.number, answer

    with ThreadPoolExecutor(options.parallel) as pool:
        waiting = [pool.submit(ask, wish) for wish in missing]
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
    return answers


def _record(wish: Wish, answer: Answer, options: Synthetic) -> Record | None:
    """The record in an answer, marked; None where it holds none (cut off, or not in the schema)."""
    try:
        texts = json.loads(answer.text)
        instruction, given, output = (texts[name] for name in ("instruction", "input", "output"))
    except (ValueError, KeyError, TypeError):
        return None
    if not all(isinstance(text, str) for text in (instruction, given, output)):
        return None
    if not (instruction.strip() or given.strip()) or not output.strip():
        return None
    mark = {
        "model": options.model,
        "template": wish.template,
        "prompt": wish.prompt,
        "prompt_sha256": hashlib.sha256(wish.prompt.encode()).hexdigest(),
    }
    label = {"label": wish.label} if wish.label is not None else {}
    record: Record = {"instruction": instruction, "input": given, "output": output, **label, "synthetic": mark}
    return record | {"source": {"file": f"synthetic:{options.model}", "row": wish.number + 1}}


def _numbers_by_label(store: Store) -> dict[str | None, list[int]]:
    found: dict[str | None, list[int]] = {}
    for number, record in store.living():
        found.setdefault(record.get("label"), []).append(number)
    return found
