"""The most memory that each stage of a build holds, on a checkpoint of a real model's shape with random weights.

    python benchmarks/memory.py                      # DeepSeek-R1-Distill-Qwen-1.5B's shape, all three precisions
    python benchmarks/memory.py --layers 2           # to try it out

It writes the base (bfloat16) and a LoRA adapter on all linear modules into a temporary folder (some 35 GB at the full
shape), runs each stage of a build on them in a process of its own, as the build does, adds the processes' peaks to the
results, and prints the table of all of them: a stage that was not run at the full depth lies on the line through two
depths at which it was. "ask" and "publish" open the sessions that "verify" opens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import publish, save
from machine import describe
from roster import HERE, ROOT
from synthetic_model import SHAPE, TOKENIZER_FILES, write_checkpoint

from stillhouse.build.quantize import method_of, stage_options
from stillhouse.build.recipe import PRECISIONS, QuantizeOptions
from stillhouse.build.texts import evaluation_text, excerpts, token_ids, token_windows
from stillhouse.build.verify import read_network
from stillhouse.build.worker import run_stage
from stillhouse.engine.manifest import Precision

DOCS, BEGIN, END = ROOT / "docs/build.md", "<!-- memory: begin -->", "<!-- memory: end -->"
WINDOWS = 2
LIMIT_BYTES = 12 * 2**30
RUNTIME_BYTES = 300_000_000  # what the libraries take, whatever the model
SHAPE_7B = SHAPE | {  # DeepSeek-R1-Distill-Qwen-7B's
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
Stage = dict[str, Any]  # {"name", "rss", "anonymous" (bytes, peaks), "seconds" (None: it was stopped)}
Run = dict[str, Any]  # {"layers", "int4", "measured", "machine", "stages"}


def write_inputs(folder: Path, tokenizer: Path, shape: dict[str, Any]) -> None:
    """A base and an adapter."""
    for name in ("base", "adapter"):
        (folder / name).mkdir(parents=True)
    write_checkpoint(folder / "base", shape)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder / "base")
    write_adapter(folder / "adapter", shape)


def _kv_width(shape: dict[str, Any]) -> int:
    return int(shape["hidden_size"] // shape["num_attention_heads"] * shape["num_key_value_heads"])


def write_adapter(folder: Path, shape: dict[str, Any], rank: int = 16) -> None:
    """A random LoRA on every linear module of every layer, in peft's format."""
    import torch
    from safetensors.torch import save_file

    hidden, width = shape["hidden_size"], shape["intermediate_size"]
    kv_width = _kv_width(shape)
    modules = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
    modules |= {f"self_attn.{name}_proj": (kv_width, hidden) for name in "kv"}
    modules |= {f"mlp.{name}_proj": (width, hidden) for name in ("gate", "up")} | {"mlp.down_proj": (hidden, width)}
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, (rows, columns) in modules.items():
            place = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.02
            tensors[f"{place}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    config |= {"target_modules": sorted({name.rpartition(".")[2] for name in modules}), "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


class Watch(threading.Thread):
    """The most anonymous memory of each stage's process, looked at ten times a second.

    The resident set's peak, which the build itself records, counts the pages of mapped files too: the system takes
    those back when memory is short, anonymous ones it cannot.
    """

    def __init__(self, build: int) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[int, int] = {}  # by the worker's process id, in the order of the stages
        self._build = build
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(0.1):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that ended between two looks
                self._look()

    def _look(self) -> None:
        for child in map(int, Path(f"/proc/{self._build}/task/{self._build}/children").read_text().split()):
            if b"stillhouse.build.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                now = _anonymous_bytes(Path(f"/proc/{child}/status").read_text())
                self.peaks[child] = max(self.peaks.get(child, 0), now)


def _anonymous_bytes(status: str) -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0  # a process that is ending has none


def stages(folder: Path, precisions: list[Precision], int4: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The stages of a build as its pipeline runs them: title, the worker's function, its arguments.

    Of the evaluation text there are WINDOWS windows, which go through one at a time: more would only take longer.
    """
    merged, fp32 = folder / "merge", folder / "fp32"
    text = evaluation_text(None)
    adapters = [{"path": str(folder / "adapter"), "weight": 1.0}]
    base: dict[str, Any] = {"base": str(folder / "base"), "adapters": adapters, "probe_texts": excerpts(text)}
    yield "merge", "merge", base | {"destination": str(merged)}
    export = {"checkpoint": str(merged), "precision": "fp32", "target": "cpu", "options": {}}
    yield "export fp32", "export", export | {"destination": str(fp32)}
    network = read_network(merged)
    windows = token_windows(token_ids(text, merged / "tokenizer.json"), network.context_length)[:WINDOWS]
    measured = {"network": network.model_dump(), "windows": windows, "spool": str(folder / "reference.f32")}
    yield "reference", "reference", measured | {"model": str(fp32 / "model.onnx")}
    quantized = {"checkpoint": str(merged), "graph": str(fp32), "network": network.model_dump()}
    for precision in precisions:
        method = method_of(precision, QuantizeOptions(method=int4 if precision == "int4" else "auto"), "cpu")
        title = f"make {precision}"
        arguments: dict[str, Any] = {"source": str(fp32)}
        if method.bits:
            title += f" by {method.name}"
            arguments = quantized | stage_options(method, QuantizeOptions(method=method.name))
        if method.calibrated:
            model = {"model": str(fp32 / "model.onnx"), "checkpoint": str(merged), "network": network.model_dump()}
            yield "calibrate", "calibrate", model | {"destination": str(folder / "calibrate")}
            arguments |= {"calibration": str(folder / "calibrate" / "calibration.json")}
        yield title, method.stage, arguments | {"destination": str(folder / title.replace(" ", "-"))}
        model_file = str(folder / title.replace(" ", "-") / "model.onnx")
        yield f"verify {precision}", "fidelity", measured | {"model": model_file}


def measure(folder: Path, run: Run, precisions: list[Precision]) -> Iterator[Run]:
    """Runs the stages, and gives `run` after each with the stage's peaks; what `folder` holds is not made again."""
    with Watch(os.getpid()) as watch:
        for title, stage, arguments in stages(folder, precisions, run["int4"]):
            destination = arguments.get("destination")
            if destination is not None and Path(destination).is_dir():
                continue
            began = time.perf_counter()
            if destination is not None:  # what a killed run left is not taken for whole
                arguments |= {"destination": f"{destination}.part"}
                shutil.rmtree(f"{destination}.part", ignore_errors=True)
            done = run_stage(stage, arguments, log=folder / f"{title.replace(' ', '-')}.log", share=lambda _: None)
            if destination is not None:
                Path(f"{destination}.part").rename(destination)
            anonymous = list(watch.peaks.values())[-1]
            seconds = time.perf_counter() - began
            print(f"{title}: {done.peak_rss_bytes / 2**30:.2f} GiB, {seconds:.0f} s", file=sys.stderr, flush=True)
            figures = {"rss": done.peak_rss_bytes, "anonymous": anonymous, "seconds": seconds}
            run["stages"].append({"name": title} | figures)
            yield run


def parameters(shape: dict[str, Any]) -> int:
    """The weights of a Qwen2 of this shape, its biases and norms left out."""
    hidden, kv_width = shape["hidden_size"], _kv_width(shape)
    layer = 2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * shape["intermediate_size"]
    return int(shape["num_hidden_layers"] * layer + 2 * shape["vocab_size"] * hidden)


def by_stage(runs: list[Run]) -> dict[str, tuple[Stage, bool]]:
    """Each stage at the full depth, and whether it was measured there: else it lies on the line through two depths."""
    points: dict[str, dict[int, Stage]] = {}
    for run in sorted(runs, key=lambda run: -int(run["layers"])):
        for stage in run["stages"]:
            points.setdefault(stage["name"], {})[run["layers"]] = stage
    full = SHAPE["num_hidden_layers"]
    found: dict[str, tuple[Stage, bool]] = {}
    for title, depths in points.items():
        if full in depths:
            found[title] = (depths[full], True)
        elif len(depths) > 1:
            low, high = min(depths), max(depths)
            found[title] = (_on_line(depths[low], depths[high], (full - low) / (high - low)), False)
    return found


def _on_line(low: Stage, high: Stage, share: float) -> Stage:
    keys = ("rss", "anonymous")
    return {"name": low["name"], "seconds": 0} | {key: low[key] + share * (high[key] - low[key]) for key in keys}


def markdown(runs: list[Run]) -> str:
    """The stages' peaks for the 1.5B, and for the 7B by its parameters."""
    scale = parameters(SHAPE_7B) / parameters(SHAPE)
    lines = ["| stage | RSS, GiB | of it anonymous | minutes | 7B: RSS | 7B: anonymous |", "|---|--:|--:|--:|--:|--:|"]
    stages = by_stage(runs)
    for title, (stage, measured) in stages.items():
        figures = [stage["rss"], stage["anonymous"]]
        larger = [RUNTIME_BYTES + scale * max(0, figure - RUNTIME_BYTES) for figure in figures]
        own, other = ([f"{figure / 2**30:.1f}" for figure in pair] for pair in (figures, larger))
        minutes = f"{stage['seconds'] / 60:.1f}" if stage["seconds"] else "stopped"
        minutes = minutes if measured else "–"  # two runs beside other work say nothing of a third's time
        lines.append(f"| {title}{'' if measured else ' (computed)'} | {' | '.join([*own, minutes, *other])} |")
    most = max(stage["rss"] for stage, _ in stages.values()) / 2**30
    about, depths = runs[-1]["machine"], sorted({run["layers"] for run in runs})
    lines += ["", f"The most: {most:.1f} GiB, of {LIMIT_BYTES / 2**30:.0f} that the 1.5B may take."]
    if any(stage["seconds"] is None for stage, _ in stages.values()):
        lines += ["A stage that was stopped had loaded its graph and begun with the text, a window at a time."]
    lines += [
        f"Machine: {about['processor']}, {about['cores']} cores, shared with other work. Runs of "
        f"{', '.join(map(str, depths))} layers. Measured {runs[-1]['measured']}."
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", type=Path, default=ROOT / "examples/smollm2/base", help="a folder to borrow from"
    )
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp16", "int8", "int4"])
    parser.add_argument("--int4", default="auto", help="the method of INT4; k_quant needs no calibration")
    parser.add_argument(
        "--folder", type=Path, help="where to work, kept afterwards; a second run finds the stages cached"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results/memory.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table of all runs into docs/build.md")
    args = parser.parse_args()
    runs = json.loads(args.out.read_text("utf-8"))["runs"] if args.out.is_file() else []
    measured = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    run = {"layers": args.layers, "int4": args.int4, "measured": measured, "machine": describe(), "stages": []}
    with tempfile.TemporaryDirectory(prefix="stillhouse-memory-") as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "base").is_dir():
            write_inputs(folder, args.tokenizer, SHAPE | {"num_hidden_layers": args.layers})
        for so_far in measure(folder, run, args.precisions):
            save({"runs": [*runs, so_far]}, args.out)
    runs.append(run)
    publish({"runs": runs}, markdown(runs), args.out, [DOCS] if args.write_docs else [], BEGIN, END)
    return int(max((stage["rss"] for stage in run["stages"]), default=0) > LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
