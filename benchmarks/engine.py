"""The engine against its peers: same model at 4 bits, same prompts, same number of threads, one after the other.

    python benchmarks/engine.py --setup all      # environments and models of the peers, once (minutes)
    python benchmarks/engine.py                  # three rounds: A B C A B C …, each peer in a fresh process a round
    python benchmarks/engine.py --quick --peers stillhouse onnxruntime-genai
    python benchmarks/engine.py --write-docs     # the table goes into docs/benchmarks.md

What is measured: benchmarks/peers/protocol.py. The report is benchmarks/results/engine.json.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bandwidth import read_bandwidth_gb_s
from figures import markdown, perplexity, publish, ratios, save, summarise
from machine import describe
from roster import BASE, CACHE, HERE, ROOT, PeerError, PeerProcess, PeerSpec, known, set_up
from workload import Workload

OURS = "stillhouse"
VERSION = ROOT / "model_repository/support-int4/1"
BEGIN, END = "<!-- engine: begin -->", "<!-- engine: end -->"
PAGES = (ROOT / "docs/benchmarks.md", ROOT / "docs/engine.md")
SEQUENCES = (1, 4, 16, 32)
PREFILL_TOKENS = (256, 1024)
TTFT_PROMPT_TOKENS, TTFT_CONCURRENT = 128, 16
HELD_OUT_TOKENS = 4096


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stillhouse bench engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version-dir", type=Path, default=VERSION, help="the INT4 version that ours and genai open")
    parser.add_argument("--peers", nargs="+", choices=list(known()), default=list(known()), metavar="PEER")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of every peer")
    parser.add_argument("--tokens", type=int, default=48, help="decode steps that are timed")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts: another seed, other prompts")
    parser.add_argument("--quick", action="store_true", help="one round of few tokens: whether it works, not how fast")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="for one answer of a peer")
    parser.add_argument("--no-perplexity", action="store_true")
    parser.add_argument("--setup", nargs="+", choices=["all", *known()], metavar="PEER", help="set peers up, and end")
    parser.add_argument("--compile", action="store_true", help="with --setup: build llama.cpp for this CPU (an hour)")
    parser.add_argument("--out", type=Path, default=HERE / "results/engine.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--log", type=Path, default=CACHE / "peers.log", help="what the peers print")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    peers = known()
    try:
        if args.setup:
            for name in peers if "all" in args.setup else args.setup:
                print(f"setting up {name} …", file=sys.stderr)
                set_up(peers[name], compile_native=args.compile)
            return 0
        if not (args.version_dir / "manifest.json").is_file():
            raise PeerError(f"{args.version_dir} is not a version directory: build one, or name one by --version-dir")
        report = run(args, [peers[name] for name in args.peers])
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    publish(report, markdown(report), args.out, PAGES if args.write_docs else [], BEGIN, END)
    return 0


def run(args: argparse.Namespace, peers: list[PeerSpec]) -> dict[str, Any]:
    """All rounds; the report. A peer that fails is left out from then on, and the report says why."""
    rounds, held_out = (1, 1024) if args.quick else (args.rounds, HELD_OUT_TOKENS)
    workload = Workload.of_manual(args.version_dir / "tokenizer.json", args.seed, held_out)
    samples: dict[str, dict[str, list[float]]] = {}
    settings: dict[str, dict[str, Any]] = {}
    failed = {peer.name: why for peer in peers if (why := peer.why_not(args.version_dir))}
    bandwidth = read_bandwidth_gb_s(args.threads, repeats=1 if args.quick else 5)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    with args.log.open("w", encoding="utf-8") as log:
        for number in range(rounds):
            for peer in peers:
                if peer.name in failed:
                    continue
                print(f"round {number + 1} of {rounds}: {peer.name} …", file=sys.stderr)
                try:
                    about, figures = session(args, peer, workload, number, log)
                except PeerError as error:
                    failed[peer.name] = str(error)
                    samples.pop(peer.name, None)
                    continue
                settings[peer.name] = about["settings"]
                for key, value in figures.items():
                    samples.setdefault(peer.name, defaultdict(list))[key].append(value)
            if OURS in samples:
                save(report_of(args, rounds, bandwidth, samples, settings, failed), args.out)
    if OURS not in samples:
        raise PeerError(f"nothing to compare: {failed.get(OURS, f'{OURS} is not among the peers')}")
    reference_figures = {} if args.no_perplexity else reference(args, workload)
    return report_of(args, rounds, bandwidth, samples, settings, failed) | reference_figures


def report_of(
    args: argparse.Namespace,
    rounds: int,
    bandwidth: float,
    samples: dict[str, dict[str, list[float]]],
    settings: dict[str, dict[str, Any]],
    failed: dict[str, str],
) -> dict[str, Any]:
    """What is known so far; it is saved after every round, so that a run that is cut short was not in vain."""
    results = summarise(samples)
    return {
        "ours": OURS,
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(),
        "threads": args.threads,
        "rounds": rounds,
        "tokens": args.tokens,
        "seed": args.seed,
        "quick": args.quick,
        "bandwidth_gb_s": bandwidth,
        "results": results,
        "ratios": ratios(results, OURS),
        "settings": settings,
        "failed": failed,
        "samples": samples,
    }


def reference(args: argparse.Namespace, workload: Workload) -> dict[str, float]:
    """The perplexity of the FP32 checkpoint that all peers' models come from, if it is there."""
    peer = PeerSpec("FP32", "reference.py", None, BASE)
    if peer.why_not(args.version_dir):
        return {}
    load = {"threads": args.threads, "sequences": 1, "context_tokens": 0}
    with PeerProcess(peer, args.version_dir, timeout_s=args.timeout_s, **load) as process:
        answer = process.ask("perplexity", windows=workload.windows())
    return {"reference_perplexity": perplexity(answer["nll"], answer["tokens"])}


def session(
    args: argparse.Namespace, peer: PeerSpec, workload: Workload, number: int, log: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """One peer's turn of round `number`, in a fresh process that is warmed up: everything once; its samples."""
    tokens = 12 if args.quick else args.tokens
    sequences = (1, 4) if args.quick else SEQUENCES
    prefills = PREFILL_TOKENS[:1] if args.quick else PREFILL_TOKENS
    concurrent = 4 if args.quick else TTFT_CONCURRENT
    load = {"threads": args.threads, "sequences": max(SEQUENCES), "context_tokens": 2048}
    figures: dict[str, float] = {}
    with PeerProcess(peer, args.version_dir, timeout_s=args.timeout_s, log=log, **load) as process:
        figures |= {"load_s": process.about["load_s"], "start_s": process.start_s}
        figures["model_bytes"] = process.about["model_bytes"]
        process.ask("decode", prompts=workload.prompts(4, number, "warm"), tokens=8)
        process.ask("prefill", prompt=workload.prompt(PREFILL_TOKENS[0], number, "warm"))
        for count in sequences:
            answer = process.ask("decode", prompts=workload.prompts(count, number, "decode", count), tokens=tokens)
            figures[f"decode_{count}"] = answer["tokens_per_s"]
        for length in prefills:
            answer = process.ask("prefill", prompt=workload.prompt(length, number, "prefill", length))
            figures[f"prefill_{length}"] = answer["tokens_per_s"]
        alone = [workload.prompt(TTFT_PROMPT_TOKENS, number, "alone", i) for i in range(1 if args.quick else 4)]
        times = [process.ask("ttft", prompts=[prompt])["ttft_s"][0] for prompt in alone]
        figures["ttft_1"] = median(times[1:] or times)
        together = [workload.prompt(TTFT_PROMPT_TOKENS, number, "together", i) for i in range(concurrent)]
        times = process.ask("ttft", prompts=together)["ttft_s"]
        figures |= {"ttft_16_median": median(times), "ttft_16_last": max(times)}
        figures["peak_rss_bytes"] = process.ask("memory")["peak_rss_bytes"]
        if number == 0 and not args.no_perplexity:
            answer = process.ask("perplexity", windows=workload.windows())
            if "nll" in answer:
                figures["perplexity"] = perplexity(answer["nll"], answer["tokens"])
        return process.about, figures


if __name__ == "__main__":
    sys.exit(main())
