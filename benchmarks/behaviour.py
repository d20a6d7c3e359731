"""What the engine promises beside speed, measured on a version directory: the cost of Python, stalls, reuse, linearity.

    python benchmarks/behaviour.py                # a table on stdout, benchmarks/results/behaviour.json
    python benchmarks/behaviour.py --write-docs   # the table goes into docs/benchmarks.md
    python benchmarks/behaviour.py --rounds 1 --more   # one round more, beside those that --out holds

- Python and scheduling: the share of a decode step of 16 sequences that is not spent inside ONNX Runtime.
- Worst gap: the longest time between two tokens of 8 running streams while a 2,000-token prompt comes in, with the
  prompt prefilled in chunks and whole.
- Prefix reuse: time to first token of a prompt whose first 1,000 tokens another one had, with reuse and without.
- Linear cost: the time of 128 requests over that of 64, 16 at a time.
- Idle: CPU seconds a second of a loaded engine that nobody asks.
- The cache of packed weights: the time to load, libraries already imported, and the memory that no file backs after
  16 tokens, in a fresh process each, with the cache and without. (`benchmarks/engine.py` compares loads with peers'.)
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import itertools

from figures import publish, two_columns
from machine import describe
from roster import HERE, ROOT, PeerProcess, known
from workload import Workload

from stillhouse.engine.model import LanguageModel
from stillhouse.engine.options import EngineOptions
from stillhouse.engine.request import Token
from stillhouse.engine.sampling import SamplingParams

VERSION = ROOT / "model_repository/support-int4/1"
DOCS, BEGIN, END = ROOT / "docs/benchmarks.md", "<!-- behaviour: begin -->", "<!-- behaviour: end -->"
LONG_PROMPT_TOKENS, SHARED_TOKENS = 2000, 1000
MOST_WAITING = 128  # all requests of the linear cost are there at once


class Streams:
    """Answers that run at the same time, and the moment of each of their tokens."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._ended: queue.SimpleQueue[Token] = queue.SimpleQueue()
        self.submitted_s: list[float] = []
        self.times_s: list[list[float]] = []

    def add(self, prompt: Sequence[int], tokens: int) -> list[float]:
        """Submits `prompt`; returns the list that its tokens' moments will be in."""
        times: list[float] = []

        def take(token: Token) -> None:
            times.append(time.perf_counter())
            if token.finish_reason is not None:
                self._ended.put(token)

        self.submitted_s.append(time.perf_counter())
        self.times_s.append(times)
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        self._model.engine.submit(prompt, params, take)
        return times

    def wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            time.sleep(0.002)

    def wait(self) -> None:
        for _ in self.times_s:
            if (error := self._ended.get(timeout=600).error) is not None:
                raise error


def load(version: Path, threads: int, **options: Any) -> LanguageModel:
    options = {"max_num_seqs": 32, "max_model_len": 2304} | options
    return LanguageModel.load(
        version, EngineOptions(threads=threads, max_waiting=MOST_WAITING, **options), verify=False
    )


def outside_runtime_share(version: Path, threads: int, workload: Workload, rows: int = 16, steps: int = 96) -> float:
    """The share of a decode step that is Python: scheduling, sampling, handing over."""
    with load(version, threads) as model:
        session, runner = model.engine._runner._session, model.engine._runner  # type: ignore[attr-defined]
        inside_s: list[float] = []
        began_s: list[float] = []
        decode = runner.decode

        class Timed:
            """The session, with a watch on it."""

            def __getattr__(self, name: str) -> Any:
                return getattr(session, name)

            def run_with_iobinding(self, binding: Any) -> None:
                before_s = time.perf_counter()
                session.run_with_iobinding(binding)
                inside_s.append(time.perf_counter() - before_s)

        def timed_decode(tokens: Sequence[int], lengths: Sequence[int]) -> Any:
            began_s.append(time.perf_counter())
            return decode(tokens, lengths)

        streams = Streams(model)
        for prompt in workload.prompts(rows, "share"):
            streams.add(prompt, steps + 2 * rows)
        streams.wait_for(lambda: all(len(times) > 2 for times in streams.times_s))
        runner._session, runner.decode = Timed(), timed_decode
        streams.wait_for(lambda: min(map(len, streams.times_s)) > steps)
        count = min(len(began_s), len(inside_s)) - 1
        wall_s = began_s[count] - began_s[0]
        share = 1 - sum(inside_s[:count]) / wall_s
        streams.wait()
    return share


def worst_gap_s(version: Path, threads: int, workload: Workload, chunk_tokens: int, rows: int = 8) -> float:
    """The longest gap between two tokens of `rows` streams, from the arrival of a long prompt to its first token."""
    with load(version, threads, prefill_chunk_tokens=chunk_tokens, prefill_alone_tokens=chunk_tokens) as model:
        streams = Streams(model)
        for prompt in workload.prompts(rows, "gap"):
            streams.add(prompt, 160)
        streams.wait_for(lambda: min(map(len, streams.times_s)) > 8)
        arrived_s = time.perf_counter()
        first = streams.add(workload.prompt(LONG_PROMPT_TOKENS, "gap"), 2)
        streams.wait()
    gaps = [
        later - earlier
        for times in streams.times_s[:rows]
        for earlier, later in itertools.pairwise(times)
        if later > arrived_s and earlier < first[0]
    ]
    return max(gaps)


def ttft_behind_prefix_s(version: Path, threads: int, workload: Workload, prefix_slots: int) -> float:
    """The median time to first token of 4 prompts that begin with the same tokens; the first is not counted."""
    shared = workload.prompt(SHARED_TOKENS, "shared")
    with load(version, threads, prefix_slots=prefix_slots) as model:
        waits = []
        for number in range(5):
            streams = Streams(model)
            times = streams.add([*shared, *workload.prompt(40, "question", number)], 4)
            streams.wait()
            waits.append(times[0] - streams.submitted_s[0])
    return median(waits[1:])


def time_of_requests_s(version: Path, threads: int, workload: Workload, requests: int) -> float:
    """The time of `requests` of 64 to 128 tokens, each answered by 24, 16 at a time."""
    with load(version, threads, max_num_seqs=16) as model:
        warm = Streams(model)
        warm.add(workload.prompt(64, "warm"), 4)
        warm.wait()
        streams = Streams(model)
        for number in range(requests):
            streams.add(workload.prompt(96, "linear", number), 24)
        streams.wait()
    return max(times[-1] for times in streams.times_s) - streams.submitted_s[0]


def idle_cpu_share(version: Path, threads: int, workload: Workload, wait_s: float = 5.0) -> float:
    """CPU seconds a second of this process, with a loaded engine that has answered and now waits."""
    with load(version, threads) as model:
        streams = Streams(model)
        streams.add(workload.prompt(64, "idle"), 4)
        streams.wait()
        time.sleep(0.5)
        before_s = time.process_time()
        time.sleep(wait_s)
        return (time.process_time() - before_s) / wait_s


def of_a_start(version: Path, threads: int, workload: Workload, *, weights_cache: bool) -> dict[str, float]:
    """{"load_s", "anonymous_bytes"} of a fresh process that has answered with 16 tokens."""
    load = {"threads": threads, "sequences": 4, "context_tokens": 2048, "weights_cache": weights_cache}
    with PeerProcess(known()["stillhouse"], version, timeout_s=300, **load) as process:
        process.ask("decode", prompts=workload.prompts(1, "start"), tokens=16)
        return {"load_s": process.about["load_s"], "anonymous_bytes": process.ask("memory")["anonymous_bytes"]}


def measure(
    version: Path, threads: int, rounds: int, seed: int, earlier: dict[str, list[float]] | None = None
) -> dict[str, Any]:
    """Every figure, the ones that are compared in turns; medians over `rounds` and the `earlier` samples."""
    workload = Workload.of_manual(version / "tokenizer.json", seed)
    turns: dict[str, Callable[[], float]] = {
        "outside_runtime_share": lambda: outside_runtime_share(version, threads, workload),
        "worst_gap_chunked_s": lambda: worst_gap_s(version, threads, workload, EngineOptions().prefill_chunk_tokens),
        "worst_gap_whole_s": lambda: worst_gap_s(version, threads, workload, LONG_PROMPT_TOKENS),
        "ttft_prefix_reused_s": lambda: ttft_behind_prefix_s(version, threads, workload, 4),
        "ttft_prefix_prefilled_s": lambda: ttft_behind_prefix_s(version, threads, workload, 0),
        "requests_64_s": lambda: time_of_requests_s(version, threads, workload, 64),
        "requests_128_s": lambda: time_of_requests_s(version, threads, workload, 128),
    }
    samples: dict[str, list[float]] = {name: [] for name in turns} | (earlier or {})
    for number in range(rounds):
        print(f"round {number + 1} of {rounds} …", file=sys.stderr)
        for name, take in turns.items():
            samples[name].append(take())
        for way, cached in (("mapped", True), ("packed_anew", False)):
            for name, figure in of_a_start(version, threads, workload, weights_cache=cached).items():
                samples.setdefault(f"{way}_{name}", []).append(figure)
    figures = {name: median(taken) for name, taken in samples.items()}
    figures["linear_ratio"] = median(
        twice / (2 * once) for once, twice in zip(samples["requests_64_s"], samples["requests_128_s"], strict=True)
    )
    figures["idle_cpu_share"] = idle_cpu_share(version, threads, workload)
    return {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(),
        "threads": threads,
        "rounds": len(samples["requests_64_s"]),
        "seed": seed,
        "figures": figures,
        "samples": samples,
    }


def markdown(report: dict[str, Any]) -> str:
    of = report["figures"]
    chunk = EngineOptions().prefill_chunk_tokens
    rows = [
        ("Python and scheduling in a decode step of 16 sequences", f"{of['outside_runtime_share']:.1%}"),
        (
            f"worst gap of 8 streams while a 2,000-token prompt comes in, in chunks of {chunk}",
            f"{1e3 * of['worst_gap_chunked_s']:,.0f} ms",
        ),
        ("the same, the prompt prefilled whole", f"{1e3 * of['worst_gap_whole_s']:,.0f} ms"),
        ("time to first token behind 1,000 shared tokens, reused", f"{1e3 * of['ttft_prefix_reused_s']:,.0f} ms"),
        ("the same, prefilled again", f"{1e3 * of['ttft_prefix_prefilled_s']:,.0f} ms"),
        ("128 requests against twice the time of 64, 16 at a time", f"{of['linear_ratio']:.2f}"),
        ("CPU while idle", f"{of['idle_cpu_share']:.2%}"),
        ("load, packed weights mapped", f"{of['mapped_load_s']:.2f} s"),
        ("the same, packed anew (`weights_cache: false`)", f"{of['packed_anew_load_s']:.2f} s"),
        ("memory of no file, packed weights mapped", f"{of['mapped_anonymous_bytes'] / 1e6:,.0f} MB"),
        ("the same, packed anew", f"{of['packed_anew_anonymous_bytes'] / 1e6:,.0f} MB"),
    ]
    return two_columns(rows, report, f"medians of {report['rounds']} rounds, prompts' seed {report['seed']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version-dir", type=Path, default=VERSION)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results/behaviour.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--more", action="store_true", help="add the rounds to those in --out: for several sittings")
    args = parser.parse_args()
    earlier = None
    if args.more and args.out.is_file():
        report = json.loads(args.out.read_text("utf-8"))
        if (report["machine"], report["threads"], report["seed"]) != (describe(), args.threads, args.seed):
            parser.error(f"{args.out} is of another machine, number of threads or seed")
        earlier = report["samples"]
    report = measure(args.version_dir, args.threads, args.rounds, args.seed, earlier)
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)


if __name__ == "__main__":
    main()
