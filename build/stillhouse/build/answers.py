"""What a version answers: greedy answers to fixed prompts, and the recipe's tasks. Runs in a worker process.

Fidelity says how far the distributions are apart; this says what of it reaches the one who asks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.build.tasks import Task, Tasks
from stillhouse.build.worker import Share
from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.manifest import GateRecord, ModelRecord, TasksRecord
from stillhouse.engine.text import Tokenizer

GREEDY_TOKENS = 32
_SLOTS = 8
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colours.",
    "What is 12 plus 30?",
    "Explain in a sentence why the sky is blue.",
    "Give me a word that rhymes with cat.",
    "Who wrote Romeo and Juliet?",
    "How do I boil an egg?",
    "Translate 'good morning' into French.",
    "What do bees make?",
    "Name the largest planet of the solar system.",
    "Say thank you politely.",
)


@dataclass(frozen=True, slots=True)
class Replies:
    """A version's answers against the reference's, over `greedy_tokens` tokens that the reference answered."""

    greedy_prompts: int
    greedy_tokens: int
    greedy_agreement: float
    tasks: TasksRecord | None


def answers(
    share: Share, *, model: str, network: dict[str, Any], tokenizer: str, tasks: list[dict[str, Any]]
) -> dict[str, Any]:
    """The graph's greedy answers (token ids, a list a prompt), and for each task whether it was right.

    Raises StillhouseError where a task does not fit into the context.
    """
    from stillhouse.engine.runner import OrtRunner

    record, text = ModelRecord.model_validate(network), Tokenizer(Path(tokenizer))
    asked = [Task.model_validate(task) for task in tasks]
    prompts = [_prompt_ids(text, [{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    prompts = [prompt[: max(1, record.context_length - GREEDY_TOKENS)] for prompt in prompts]
    questions = [Question(text, task) for task in asked]
    longest = max([len(prompt) + GREEDY_TOKENS for prompt in prompts] + [question.tokens for question in questions])
    for number, question in enumerate(questions, 1):
        if question.tokens > record.context_length:
            raise StillhouseError(
                f"evaluate.tasks: task {number} needs {question.tokens} tokens, the model has {record.context_length}",
                hint="shorten it, or lower its max_tokens",
            )
    runner = OrtRunner(Path(model), network=record, slots=_SLOTS, max_len=min(longest, record.context_length))
    eos = set(record.eos_token_ids)
    greedy_answers = greedy(runner, prompts, [GREEDY_TOKENS] * len(prompts), eos)
    share(0.5)
    replies = ask(runner, text, questions, eos)
    share(1.0)
    return {"greedy": greedy_answers, "right": [reply.right for reply in replies]}


@dataclass(frozen=True, slots=True)
class Reply:
    """Whether a task was answered right, and in how many tokens (None: it was a choice)."""

    right: bool
    tokens: int | None


def ask(runner: Any, text: Tokenizer, questions: list[Question], eos: set[int]) -> list[Reply]:
    """A Reply to each question: free ones by greedy decoding, choices by their likelihood."""
    free = [question for question in questions if not question.choices]
    written = greedy(runner, [q.prompt for q in free], [q.task.max_tokens for q in free], eos)
    replies: dict[int, Reply] = {}
    for question, ids in zip(free, written, strict=True):
        said = [token for token in ids if token not in eos]
        replies[id(question)] = Reply(question.task.is_right(text.decode(said)), len(said))
    for question in questions:
        if question.choices:
            chosen = choose(runner, question.prompt, question.choices, question.sizes)
            replies[id(question)] = Reply(chosen == question.task.right_choice, None)
    return [replies[id(question)] for question in questions]


class Question:
    """A task in tokens: its prompt, and the tokens and characters of each choice."""

    def __init__(self, text: Tokenizer, task: Task) -> None:
        self.task = task
        self.prompt = _prompt_ids(text, task.conversation)
        rendered = _prompt_text(text, task.conversation)
        self.choices: list[list[int]] = []
        self.sizes = [len(choice) for choice in task.choices or []]
        for choice in task.choices or []:
            # Prompt and choice are encoded together, as they would stand there.
            between = "" if text.has_chat_template or rendered.endswith((" ", "\n")) else " "
            whole = text.encode(rendered + between + choice, add_special_tokens=not text.has_chat_template)
            self.choices.append(whole[len(self.prompt) :] or text.encode(choice, add_special_tokens=False))
        self.tokens = len(self.prompt) + max([len(choice) for choice in self.choices] or [task.max_tokens])


def greedy(runner: Any, prompts: list[list[int]], most: list[int], eos: set[int]) -> list[list[int]]:
    """The most likely continuation of each prompt, up to `most` tokens or an end token (which is kept)."""
    answered: list[list[int]] = []
    for start in range(0, len(prompts), _SLOTS):
        part, limits = prompts[start : start + _SLOTS], most[start : start + _SLOTS]
        rows = [[int(runner.prefill(slot, p, 0, last_only=True)[0].argmax())] for slot, p in enumerate(part)]
        while wanted := [at for at, row in enumerate(rows) if len(row) < limits[at] and row[-1] not in eos]:
            # Rows that are done are decoded once more at the same place, which changes nothing.
            at = [len(prompt) + len(row) - 1 for prompt, row in zip(part, rows, strict=True)]
            best = runner.decode([row[-1] for row in rows], at).argmax(-1)
            for slot in wanted:
                rows[slot].append(int(best[slot]))
        answered += rows
    return answered


def choose(runner: Any, prompt: list[int], choices: list[list[int]], sizes: list[int]) -> int:
    """The choice whose log-probability a character is highest ("acc_norm" of lm-evaluation-harness)."""
    from stillhouse.build.verify import log_softmax

    if len(prompt) > 1:
        runner.prefill(0, prompt[:-1], 0, last_only=True)
    scores = []
    for choice, size in zip(choices, sizes, strict=True):
        # The prompt's last token goes along: its logits are those of the choice's first.
        rows = log_softmax(runner.prefill(0, [prompt[-1], *choice], len(prompt) - 1)[:-1])
        scores.append(sum(float(row[token]) for row, token in zip(rows, choice, strict=True)) / size)
    return max(range(len(scores)), key=scores.__getitem__)


def greedy_agreement(reference: list[list[int]], other: list[list[int]]) -> float:
    """The mean share of an answer's tokens before the first one that differs, 0…1."""
    shares = []
    for expected, found in zip(reference, other, strict=True):
        shorter = min(len(expected), len(found))
        same = next((at for at in range(shorter) if expected[at] != found[at]), shorter)
        shares.append(same / max(len(expected), len(found)))
    return math.fsum(shares) / len(shares)


def compare(reference: dict[str, Any], other: dict[str, Any], tasks: Tasks | None) -> Replies:
    """How far what `other` answered is what the reference answered; both are what `answers` returned.

    Raises StillhouseError where the reference answers no task right: then there is nothing to keep.
    """
    agreement = greedy_agreement(reference["greedy"], other["greedy"])
    tokens = sum(len(answer) for answer in reference["greedy"])
    if tasks is None:
        return Replies(len(PROMPTS), tokens, agreement, None)
    known, right = reference["right"], other["right"]
    if not any(known):
        raise StillhouseError(
            f"evaluate.tasks: the merged model itself answers none of the {len(known)} tasks in {tasks.label} right",
            hint="look at the tasks' form: a base that was never taught to chat, or answers that nobody writes so",
        )
    return Replies(len(PROMPTS), tokens, agreement, tasks_record(tasks, known, right))


def tasks_record(tasks: Tasks, reference: list[bool], right: list[bool]) -> TasksRecord:
    """What is left of the reference's right answers, of which there is one at least."""
    return TasksRecord(
        file=tasks.label,
        sha256=tasks.sha256,
        tasks=len(right),
        accuracy=sum(right) / len(right),
        reference_accuracy=sum(reference) / len(reference),
        accuracy_share=sum(right) / sum(reference),
    )


def judge_tasks(tasks: TasksRecord | None, gate: GateRecord) -> str | None:
    """None where the tasks hold the gate, else the reason in a few words."""
    least = gate.task_accuracy
    if tasks is None or least is None or tasks.accuracy_share >= least:
        return None
    return (
        f"task accuracy {tasks.accuracy:.3f} is {100 * tasks.accuracy_share:.1f}% of the original's "
        f"{tasks.reference_accuracy:.3f}, below {100 * least:g}%"
    )


def _prompt_text(text: Tokenizer, messages: list[dict[str, str]]) -> str:
    if text.has_chat_template:
        return text.render_chat(messages)
    return "\n".join(message["content"] for message in messages)


def _prompt_ids(text: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    return text.encode(_prompt_text(text, messages), add_special_tokens=not text.has_chat_template)
