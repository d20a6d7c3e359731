"""What serving costs: the engine alone, Triton's gRPC streams and the gateway's events, with the same prompts.

    python benchmarks/serving_speed.py                 # a table on stdout, benchmarks/results/serving_speed.json
    python benchmarks/serving_speed.py --write-docs    # the table goes into docs/serve.md

The engine runs in a process of its own with the options that the server has, and is asked by token ids; the server
is `stillhouse serve`, asked by text. By turns A B C, A B C, …: a fixed number of requests, 16 and 32 at a time (tokens
of answers a second, prefill included), then one at a time (time to first token; the three take turns prompt by
prompt). Each way is asked by a client process of its own (asker.py), and its CPU seconds are told: on a machine of
few cores it takes them from the server.
"""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import publish
from machine import describe
from roster import HERE, ROOT
from served import Served, served
from workload import Workload

MODEL = ROOT / "model_repository/support-int4"
DOCS, BEGIN, END = ROOT / "docs/serve.md", "<!-- speed: begin -->", "<!-- speed: end -->"
WAYS = {"engine": "the engine alone", "triton": "Triton, gRPC streams", "gateway": "the gateway, events over HTTP"}
CONCURRENT = (16, 32)
PROMPT_TOKENS = 32
TTFT_TOKENS = 8
ANSWER_TIMEOUT_S = 300.0


class Asker:
    """A client process; see asker.py."""

    def __init__(self, way: str, *arguments: str) -> None:
        command = [sys.executable, str(HERE / "asker.py"), way, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._way = way
        self._answer()

    def ask(self, prompts: Sequence[str], tokens: int, concurrent: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens, "concurrent": concurrent}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], ANSWER_TIMEOUT_S)[0] or not (line := stdout.readline()):
            raise SystemExit(f"the client of {self._way} gave no answer")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def askers(server: Served, version: Path, options: dict[str, Any]) -> Iterator[dict[str, Asker]]:
    """The clients of all three ways, which wait when they are not asked."""
    arguments = {
        "engine": (str(version), json.dumps(options)),
        "triton": (server.grpc_url.removeprefix("grpc://"), server.model),
        "gateway": (server.openai_url, server.model),
    }
    with ExitStack() as stack:
        made = {}
        for way in WAYS:
            made[way] = Asker(way, *arguments[way])
            stack.callback(made[way].close)
        yield made


def cpu_s(server: Served) -> dict[str, float]:
    """CPU seconds of the server's processes so far."""
    return {role: sum(process.cpu_times()[:2]) for role, process in server.processes().items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    version = args.model / str(args.version)
    # Prompts that differ have nothing to reuse, and whoever is asked second shall not profit from the first.
    options = {"threads": args.threads, "prefix_slots": 0, "max_num_seqs": max(CONCURRENT)}
    workload = Workload.of_manual(version / "tokenizer.json", args.seed)
    samples: dict[str, list[Any]] = {}
    with served(args.model, options) as server, askers(server, version, options) as clients:
        for way in WAYS:
            clients[way].ask(texts(version, workload, 4, "warm", way), 16, 4)
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds} …", file=sys.stderr)
            for concurrent in args.concurrent:
                prompts = texts(version, workload, args.each * concurrent, number, concurrent)
                for way, client in clients.items():
                    before = cpu_s(server)
                    answer = client.ask(prompts, args.tokens, concurrent)
                    answer["server_cpu_s"] = {role: spent - before[role] for role, spent in cpu_s(server).items()}
                    samples.setdefault(f"{way}_{concurrent}", []).append(answer)
            for prompt in texts(version, workload, args.alone, number, "alone"):
                for way, client in clients.items():
                    samples.setdefault(f"{way}_ttft_s", []).append(client.ask([prompt], TTFT_TOKENS, 1)["ttft_s"][0])
    return {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(),
        "model": args.model.name,
        "threads": args.threads,
        "rounds": args.rounds,
        "tokens": args.tokens,
        "concurrent": args.concurrent,
        "seed": args.seed,
        "figures": figures(samples, args.concurrent),
        "samples": samples,
    }


def texts(version: Path, workload: Workload, count: int, *salt: Any) -> list[str]:
    """Prompts of 32 tokens, as text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(version / "tokenizer.json"))
    return [tokenizer.decode(workload.prompt(PROMPT_TOKENS, *salt, number)) for number in range(count)]


def figures(samples: Mapping[str, Sequence[Any]], concurrent: Sequence[int]) -> dict[str, Any]:
    """Medians over the rounds; ratios are those of one round's turns, which follow one another."""
    found: dict[str, Any] = {}
    for count in concurrent:
        rates = {way: [one["tokens"] / one["elapsed_s"] for one in samples[f"{way}_{count}"]] for way in WAYS}
        for way in WAYS:
            turns = samples[f"{way}_{count}"]
            ratios = [mine / alone for mine, alone in zip(rates[way], rates["engine"], strict=True)]
            found[f"{way}_{count}"] = {
                "tokens_per_s": median(rates[way]),
                "ratio": median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "client_cpu_share": median(one["cpu_s"] / one["elapsed_s"] for one in turns),
                "client_cpu_s_per_1000_tokens": median(1000 * one["cpu_s"] / one["tokens"] for one in turns),
                "server_cpu_s_per_1000_tokens": {
                    role: median(1000 * one["server_cpu_s"][role] / one["tokens"] for one in turns)
                    for role in turns[0]["server_cpu_s"]
                },
            }
    alone_s = samples["engine_ttft_s"]
    for way in WAYS:
        added = [mine - alone for mine, alone in zip(samples[f"{way}_ttft_s"], alone_s, strict=True)]
        found[f"{way}_ttft_s"] = {"median": median(samples[f"{way}_ttft_s"]), "added_median": median(added)}
    return found


def markdown(report: Mapping[str, Any]) -> str:
    of, counts = report["figures"], report["concurrent"]
    titles = [f"{count} at a time, tokens/s | of the engine's | CPU of the client" for count in counts]
    lines = [
        f"| | {' | '.join(titles)} | first token, alone | added |",
        "|---|" + "--:|" * (3 * len(counts) + 2),
    ]
    for way, title in WAYS.items():
        cells = []
        for count in counts:
            one = of[f"{way}_{count}"]
            cells.append(f"{one['tokens_per_s']:,.0f}")
            spread = f"{one['ratio']:.2f} ({one['ratio_low']:.2f}–{one['ratio_high']:.2f})"
            client = f"{one['client_cpu_share']:.0%} ({one['client_cpu_s_per_1000_tokens']:.2f} s)"
            cells += ["", "(is the client)"] if way == "engine" else [spread, client]
        ttft = of[f"{way}_ttft_s"]
        cells.append(f"{1e3 * ttft['median']:.1f} ms")
        cells.append("" if way == "engine" else f"{1e3 * ttft['added_median']:.1f} ms")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    machine = report["machine"]
    lines += [
        "",
        f"{report['model']}, prompts of {PROMPT_TOKENS} tokens, answers of {report['tokens']}; medians of"
        f" {report['rounds']} rounds by turns, in brackets the lowest and the highest. CPU of the client: as a share of"
        f" one core, and in seconds for 1,000 tokens. Machine: {machine['processor']}, {machine['cores']} cores, which"
        f" client and server share; {report['threads']} threads of the engine. Measured {report['measured']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="a model's directory in a repository")
    parser.add_argument("--version", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--concurrent", type=int, nargs="*", default=list(CONCURRENT))
    parser.add_argument("--each", type=int, default=1, help="answers of each of the concurrent clients")
    parser.add_argument("--alone", type=int, default=10, help="prompts a round that are asked one at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results/serving_speed.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/serve.md")
    args = parser.parse_args()
    report = measure(args)
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)


if __name__ == "__main__":
    main()
