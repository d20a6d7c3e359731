"""Batch 1 against the memory's speed, and the memory that it takes: a synthetic 1.5B at INT4 (synthetic_model.py).

Decoding a token at batch 1 reads every weight of every matrix product once, in the form that ONNX Runtime has packed
for the CPU's kernels, so that tokens/s × those bytes ÷ the streaming read bandwidth is the share of what the memory
allows. The same bytes are what the process must hold.

    python benchmarks/synthetic.py               # makes it (some 8 GB of disk meanwhile; cached), measures it
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bandwidth import read_bandwidth_gb_s
from figures import publish
from machine import describe
from roster import HERE, ROOT, PeerProcess, known
from synthetic_model import SHAPE, version_of
from workload import Workload

DOCS, BEGIN, END = ROOT / "docs/benchmarks.md", "<!-- synthetic: begin -->", "<!-- synthetic: end -->"


def bytes_in_file(model: Path) -> int:
    """Bytes of the weights of every matrix product, each once, as they lie in the file."""
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    scales = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    inputs = (scales.get(name, name) for node in graph.node if "MatMul" in node.op_type for name in node.input)
    return sum(_tensor_bytes(constants[name]) for name in set(inputs) & constants.keys())


def bytes_packed(version: Path) -> int:
    """The same as this CPU's kernels read them: ONNX Runtime's packed form, as the cache of packed weights holds it."""
    import onnx

    from stillhouse.engine.directory import open_version
    from stillhouse.engine.session import model_to_load

    packed = model_to_load(open_version(version, verify=False), "cpu")
    graph = onnx.load(str(packed), load_external_data=False).graph
    # Each entry: KEY|OFFSET;LENGTH;PADDING
    blobs = {e.value for t in graph.initializer for e in t.external_data if e.key.startswith("prepacked")}
    return sum(int(blob.rpartition("|")[2].split(";")[1]) for blob in blobs)


def _tensor_bytes(tensor: Any) -> int:
    where = {entry.key: entry.value for entry in tensor.external_data}
    return int(where["length"]) if where else len(tensor.raw_data)


def measure(versions: dict[int, Path], tokenizer: Path, *, threads: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Decode at batch 1 and bandwidth, in turns; for each block size the medians, and the share of the bandwidth."""
    workload = Workload.of_manual(tokenizer / "tokenizer.json", seed=0)
    packed = {size: bytes_packed(version) for size, version in versions.items()}  # which packs what is not packed yet
    samples: dict[int, dict[str, list[float]]] = {size: defaultdict(list) for size in versions}
    bandwidths = [read_bandwidth_gb_s(threads)]
    for number in range(rounds):
        for size, version in versions.items():
            load = {"threads": threads, "sequences": 1, "context_tokens": 2048}
            with PeerProcess(known()["stillhouse"], version, timeout_s=900, **load) as process:
                process.ask("decode", prompts=workload.prompts(1, number, "warm"), tokens=4)
                figures = process.ask("decode", prompts=workload.prompts(1, number), tokens=tokens)
                for key, value in (figures | process.ask("memory") | {"load_s": process.about["load_s"]}).items():
                    samples[size][key].append(value)
            bandwidths.append(read_bandwidth_gb_s(threads))
    bandwidth = max(bandwidths)
    blocks: dict[str, dict[str, float]] = {}
    for size, version in versions.items():
        of = {key: median(values) for key, values in samples[size].items()}
        of |= {"packed_bytes": packed[size], "file_weights_bytes": bytes_in_file(version / "model.onnx")}
        of["share_of_bandwidth"] = of["tokens_per_s"] * packed[size] / (bandwidth * 1e9)
        of["model_bytes"] = sum((version / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
        blocks[str(size)] = of
    about = {"threads": threads, "rounds": rounds, "bandwidth_gb_s": bandwidth, "blocks": blocks}
    return {"measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "machine": describe()} | about


def markdown(report: dict[str, Any]) -> str:
    def megabytes(key: str) -> list[str]:
        return [f"{of[key] / 1e6:,.0f} MB" for of in blocks]

    blocks = report["blocks"].values()
    rows = [
        ("decode, 1 sequence", [f"{of['tokens_per_s']:.1f} tokens/s" for of in blocks]),
        ("share of the bandwidth that it uses", [f"{of['share_of_bandwidth']:.0%}" for of in blocks]),
        ("files", megabytes("model_bytes")),
        ("of them weights that a token needs", megabytes("file_weights_bytes")),
        ("these as packed for this CPU: what a token reads", megabytes("packed_bytes")),
        ("**peak RSS**", megabytes("peak_rss_bytes")),
        ("at the end: of no file", megabytes("anonymous_bytes")),
        ("load", [f"{of['load_s']:.2f} s" for of in blocks]),
    ]
    lines = [f"| | {' | '.join(f'blocks of {size}' for size in report['blocks'])} |", "|---|" + "--:|" * len(blocks)]
    lines += [f"| {name} | {' | '.join(figures)} |" for name, figures in rows]
    machine = report["machine"]
    about = f"{machine['processor']}, {machine['cores']} cores; {report['threads']} threads"
    how = f"streaming read {report['bandwidth_gb_s']:.1f} GB/s; medians of {report['rounds']} rounds"
    return "\n".join([*lines, "", f"Machine: {about}; {how}. Measured {report['measured']}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "model_repository/support-int4/1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer: to try it out")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--out", type=Path, default=HERE / "results/synthetic.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/benchmarks.md")
    args = parser.parse_args()
    versions = {size: version_of(args.layers, args.tokenizer, size) for size in args.block_sizes}
    report = measure(versions, args.tokenizer, threads=args.threads, tokens=args.tokens, rounds=args.rounds)
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)


if __name__ == "__main__":
    main()
