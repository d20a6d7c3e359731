"""Thousands of hostile requests against a real server, and what they leave behind.

    python benchmarks/hostile.py                              # 10,000 of them; a table, benchmarks/results/hostile.json
    python benchmarks/hostile.py --write-docs                 # the table goes into docs/serve.md
    python benchmarks/hostile.py --requests 500 --seed 7 --only gateway

The server is `stillhouse serve` with one model: Triton over gRPC and HTTP, the gateway before it. Every reply is a
sound answer, a clear error (4xx or the gRPC code that fits, one line that names the rule), or bad: a fault of the
server's, a hang, a connection closed without an answer, names of the inside in a message, garbage. Between them a good
request is asked whose answer must not change. Memory is read after a warm-up of the same kinds, and at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from attacks.attack import Attack, control
from attacks.generator import DOORS, Generator
from attacks.judge import judge
from attacks.server import in_use, serving, state
from attacks.wire import Sender, Targets
from figures import publish
from machine import describe
from roster import HERE, ROOT

DOCS, BEGIN, END = ROOT / "docs/serve.md", "<!-- hostile: begin -->", "<!-- hostile: end -->"
PROMPT = "The capital of France is"
CLIENTS, CONTROL_EVERY = 8, 250
_SETTLE_S = 1.0
# What a process may still take in the second half of the requests: RSS as a share, and descriptors.
_RSS_GROWTH, _MORE_DESCRIPTORS = 0.25, 2


State = dict[str, dict[str, int]]  # by process: rss_bytes, descriptors
_WHEN = ("before", "halfway", "after")


# The requests


@dataclass
class Seen:
    """What came of the requests so far."""

    outcomes: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # (kind, door, outcome)
    bad: list[dict[str, str]] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")  # seconds, and which it was
    controls: int = 0
    changed: list[str] = field(default_factory=list)  # control answers that were other ones

    def count(self, outcome: str) -> int:
        return sum(number for (_, _, seen), number in self.outcomes.items() if seen == outcome)


def attack_all(
    generator: Generator,
    numbers: range,
    targets: Targets,
    expected: dict[str, str],
    limit_s: float = 600.0,
    seen: Seen | None = None,
) -> Seen:
    """Sends the requests of these numbers, several at a time, and the control between them; none after `limit_s`.

    What comes of them is added to `seen`, where it is given.
    """
    seen, lock, waiting = seen or Seen(), threading.Lock(), queue.SimpleQueue[int]()
    end_s = time.monotonic() + limit_s
    for number in numbers:
        waiting.put(number)

    def client() -> None:
        with Sender(targets) as sender, contextlib.suppress(queue.Empty):
            while time.monotonic() < end_s:
                number = waiting.get_nowait()
                if number % CONTROL_EVERY == 0:
                    _ask_control(sender, generator, expected, seen, lock)
                _attack(sender, generator.attack(number), seen, lock)

    clients = [threading.Thread(target=client, daemon=True) for _ in range(CLIENTS)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    with Sender(targets) as sender:
        _ask_control(sender, generator, expected, seen, lock)
    return seen


def control_answers(generator: Generator, targets: Targets) -> dict[str, str]:
    """The control's answer at each door. Raises SystemExit where there is none."""
    answers = {}
    with Sender(targets) as sender:
        for door in generator.doors:
            verdict = judge(asked := control(door, generator.model, PROMPT), sender.send(asked))
            if verdict.outcome != "answer":
                raise SystemExit(f"the {door} door does not answer: {verdict.said}")
            answers[door] = verdict.said
    return answers


def _ask_control(
    sender: Sender, generator: Generator, expected: dict[str, str], seen: Seen, lock: threading.Lock
) -> None:
    for door in generator.doors:
        verdict = judge(asked := control(door, generator.model, PROMPT), sender.send(asked))
        with lock:
            seen.controls += 1
            if verdict.said != expected[door]:
                seen.changed.append(f"{door}: {verdict.said[:200]!r} instead of {expected[door]!r}")


def _attack(sender: Sender, attack: Attack, seen: Seen, lock: threading.Lock) -> None:
    begun_s = time.perf_counter()
    outcome, said = judge(attack, sender.send(attack))
    with lock:
        took_s = time.perf_counter() - begun_s
        seen.slowest = max(seen.slowest, (took_s, f"{attack.door}, {attack.kind}, {attack.about}: {said[:80]}"))
        seen.outcomes[attack.kind, attack.door, outcome] += 1
        if outcome == "bad":
            seen.bad.append({"door": attack.door, "kind": attack.kind, "about": attack.about, "came": said})
            print(seen.bad[-1], file=sys.stderr, flush=True)


# The report


def measure(options: argparse.Namespace) -> dict[str, Any]:
    doors = tuple(options.only)
    with serving(options.repository, options.model) as running:
        warm = Generator(options.seed + 1_000_000, options.model, doors)
        expected = control_answers(warm, running.targets)
        attack_all(warm, range(1, options.warm_up + 1), running.targets, expected, options.seconds)
        time.sleep(_SETTLE_S)
        states, seen, begun_s = [state(running)], Seen(), time.perf_counter()
        numbers = range(options.first, options.first + options.requests)
        generator, half = Generator(options.seed, options.model, doors), len(numbers) // 2
        for part in (numbers[:half], numbers[half:]):
            attack_all(generator, part, running.targets, expected, options.seconds / 2, seen)
            time.sleep(_SETTLE_S)
            states.append(state(running))
        took_s, used = time.perf_counter() - begun_s - 2 * _SETTLE_S, in_use(running)
    before, halfway, after = states
    return {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(),
        "seed": options.seed,
        "requests": sum(seen.outcomes.values()),
        "seconds": round(took_s, 1),
        "slowest_s": round(seen.slowest[0], 2),
        "slowest": seen.slowest[1],
        "outcomes": [
            {"kind": kind, "door": door, "outcome": outcome, "requests": number}
            for (kind, door, outcome), number in sorted(seen.outcomes.items())
        ],
        "bad": seen.bad[:100],
        "crashed": sorted(set(running.processes) - set(after)),
        "control": {"asked": seen.controls, "changed": seen.changed[:10]},
        "before": before,
        "halfway": halfway,
        "after": after,
        "grew": grown(halfway, after),
        "in_use_afterwards": used,
    }


def grown(halfway: State, after: State) -> list[str]:
    """Which processes took notably more between the two."""
    return [
        f"{name}: {what} grew from {was[key] / scale:,.0f} to {after[name][key] / scale:,.0f}"
        for name, was in halfway.items()
        if name in after
        for what, key, scale, most in (
            ("RSS (MB)", "rss_bytes", 1e6, (1 + _RSS_GROWTH) * was["rss_bytes"]),
            ("descriptors", "descriptors", 1, was["descriptors"] + _MORE_DESCRIPTORS),
        )
        if after[name][key] > most
    ]


def markdown(report: dict[str, Any]) -> str:
    total: Counter[tuple[str, str]] = Counter()
    for row in report["outcomes"]:
        total[row["kind"], row["outcome"]] += row["requests"]
    kinds = dict.fromkeys(kind for kind, _ in total)
    for (_, outcome), number in list(total.items()):
        total["**all**", outcome] += number
    lines = [
        "| what was wrong | sound answer | clear error | client left | bad |",
        "|---|--:|--:|--:|--:|",
        *(_row(total, kind) for kind in (*kinds, "**all**")),
        "",
        "| | RSS before (MB) | halfway | afterwards | descriptors before | halfway | afterwards |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *(_process_row(name, [report[when].get(name) for when in _WHEN]) for name in report["before"]),
    ]
    used, asked, machine = report["in_use_afterwards"], report["control"], report["machine"]
    return (
        "\n".join(lines)
        + f"""

Processes that died: {len(report["crashed"])}; that grew in the second half: {len(report["grew"])}. A good request
was asked {asked["asked"]} times between them, and {len(asked["changed"])} times its answer was another one. Afterwards
{used["num_requests_running"]:.0f} requests held a slot, {used["num_requests_waiting"]:.0f} waited, and
{used["kv_cache_usage_perc"]:.0%} of the KV cache was in use.

Machine: {machine["processor"]}, {machine["cores"]} cores; {report["requests"]:,} requests of seed {report["seed"]} in
{report["seconds"]:,.0f} s, {CLIENTS} at a time, the slowest {report["slowest_s"]:.1f} s. Measured {report["measured"]}.
"""
    )


def _process_row(name: str, states: list[dict[str, int] | None]) -> str:
    rss = [f"{each['rss_bytes'] / 1e6:,.0f}" if each else "died" for each in states]
    descriptors = [str(each["descriptors"]) if each else "–" for each in states]
    return f"| {name} | {' | '.join([*rss, *descriptors])} |"


def _row(total: Counter[tuple[str, str]], kind: str) -> str:
    cells = (f"{total[kind, outcome]:,}" for outcome in ("answer", "refusal", "left", "bad"))
    return f"| {kind} | {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository")
    parser.add_argument("--model", default="support-int4")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--warm-up", type=int, default=5_000, help="requests before memory is read for the first time")
    parser.add_argument("--first", type=int, default=0, help="the number of the first one, to send some of them again")
    parser.add_argument("--seconds", type=float, default=900.0, help="after these, no new ones are sent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=DOORS, default=list(DOORS))
    parser.add_argument("--out", type=Path, default=HERE / "results/hostile.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/serve.md")
    options = parser.parse_args()
    report = measure(options)
    publish(report, markdown(report), options.out, [DOCS] if options.write_docs else [], BEGIN, END)
    for line in report["grew"]:
        print(line, file=sys.stderr)
    return 1 if report["bad"] or report["crashed"] or report["control"]["changed"] or report["grew"] else 0


if __name__ == "__main__":
    sys.exit(main())
