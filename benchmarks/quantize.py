"""What each way to quantize keeps of the demo's model, at how many bytes: the model builder's recipes beside ours.

    python benchmarks/quantize.py                     # every row that is not measured yet (a quarter of an hour)
    python benchmarks/quantize.py --only auto --again
    python benchmarks/quantize.py --write-docs        # the table into docs/quantize.md

Needs `make demo` first: the merge, its FP32 graph and the calibration text are taken from the stage cache. Every row is
a graph, measured as the build does it: by the engine, teacher-forced, on held-out text (prefill and one-token decode).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.build.cache import cache_root
from stillhouse.build.plan import Plan, plan
from stillhouse.build.publish import FILES
from stillhouse.build.recipe import load_recipe
from stillhouse.build.texts import token_ids, token_windows
from stillhouse.build.verify import read_network
from stillhouse.build.worker import run_stage
from stillhouse.engine.errors import StillhouseError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "quantize.json"
DOCS, BEGIN, END = ROOT / "docs" / "quantize.md", "<!-- table: begin -->", "<!-- table: end -->"
_LEVEL = {"accuracy_level": "4", "block_size": "32"}

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Way:
    """One row: its name, the stage that makes its graph, the stage's words, and the row whose bytes it may take."""

    title: str
    stage: str
    words: dict[str, Any]
    bytes_of: str | None = None


def _builder(title: str, precision: str, **options: str) -> Way:
    return Way(f"builder: {title}", "export", {"precision": precision, "options": _LEVEL | options})


def _ours(title: str, bits: int = 4, bytes_of: str | None = None, **words: Any) -> Way:
    return Way(f"**{title}**", "quantize", {"bits": bits, **words}, bytes_of)


WAYS: dict[str, Way] = {
    "fp16": Way("**FP16**", "convert_fp16", {}),
    "builder-int8": _builder("INT8", "int8"),
    "int8": _ours("INT8 (block 32, tied 8-bit embedding)", 8, method="rtn"),
    "builder-default": _builder("INT4 default (symmetric)", "int4"),
    "builder-128": _builder("INT4 default, block 128", "int4", block_size="128"),
    "builder-k_quant": _builder("INT4 k_quant", "int4", algo_config="k_quant", is_symmetric="false"),
    "builder-rtn_last": _builder("INT4 rtn_last", "int4", algo_config="rtn_last"),
    "builder-k_quant_last": _builder("INT4 k_quant_last", "int4", algo_config="k_quant_last"),
    "builder-k_quant_mixed": _builder("INT4 k_quant_mixed", "int4", algo_config="k_quant_mixed"),
    "rtn": _ours("INT4 rtn", method="rtn"),
    "hqq": _ours("INT4 hqq", method="hqq"),
    "k_quant": _ours("INT4 k_quant", method="k_quant"),
    "gptq": _ours("INT4 gptq", method="gptq"),
    "rtn-0.425": _ours("INT4 rtn, 0.425 of FP16's bytes", method="rtn", max_bytes_share=0.425),
    "auto-128": _ours("INT4 auto, the bytes of builder's block 128", bytes_of="builder-128", method="auto"),
    "auto-default": _ours("INT4 auto, the bytes of builder's default", bytes_of="builder-default", method="auto"),
    "auto-k_quant": _ours("INT4 auto, the bytes of builder's k_quant", bytes_of="builder-k_quant", method="auto"),
    "auto-rtn_last": _ours("INT4 auto, the bytes of builder's rtn_last", bytes_of="builder-rtn_last", method="auto"),
    "auto-0.385": _ours("INT4 auto, 0.385", method="auto", max_bytes_share=0.385),
    "auto": _ours("INT4 auto (0.425, the default)", method="auto"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "examples" / "support" / "recipe.toml")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="ROW")
    parser.add_argument("--again", action="store_true", help="measure rows again that are measured already")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/quantize.md, and end")
    asked = parser.parse_args()
    rows: dict[str, Row] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    if asked.write_docs:
        write_docs(rows)
        return 0
    with tempfile.TemporaryDirectory(prefix="stillhouse-quantize-bench-") as scratch:
        try:
            bench = _Bench(plan(load_recipe(asked.recipe), ROOT / "model_repository"), Path(scratch))
        except StillhouseError as error:
            sys.exit(f"error: {error}\nhint: {error.hint or 'make demo'}")
        for name in asked.only:
            if name in rows and not asked.again:
                continue
            at_most = WAYS[name].bytes_of
            rows[name] = bench.measure(name, rows[at_most]["bytes"] if at_most else None)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
            print(f"{name:22} {line(WAYS[name].title, rows[name])}", flush=True)
    return 0


class _Bench:
    """The demo's merge and reference, and a folder for graphs."""

    def __init__(self, plan_: Plan, scratch: Path) -> None:
        self.scratch = scratch
        self.merged = _entry("merge", plan_.merge_key)
        self.fp32 = _entry("fp32", plan_.reference_key)
        key = next(version.calibration_key for version in plan_.versions if version.calibration_key)
        self.calibration = _entry("calibrate", key) / "calibration.json"
        network = read_network(self.merged)
        windows = token_windows(token_ids(plan_.text, self.merged / "tokenizer.json"), network.context_length)
        self.measured = {"network": network.model_dump(), "windows": windows, "spool": str(scratch / "reference.f32")}
        self._run("reference", {"model": str(self.fp32 / "model.onnx"), **self.measured})

    def measure(self, name: str, at_most: int | None) -> Row:
        """Makes the row's graph, and measures it; a graph that does not load or run is a row too.

        `at_most` bounds the bytes of our own: of the graph and its weights, as the table counts them.
        """
        way, folder = WAYS[name], self.scratch / name
        words: dict[str, Any] = {"destination": str(folder), **way.words}
        if way.stage == "export":
            words |= {"checkpoint": str(self.merged), "target": "cpu"}
        elif way.stage == "convert_fp16":
            words |= {"source": str(self.fp32)}
        else:
            words |= {"checkpoint": str(self.merged), "graph": str(self.fp32), "network": self.measured["network"]}
            words |= {"calibration": str(self.calibration)}
            words |= {"max_bytes": at_most + _bytes_in(self.merged)} if at_most is not None else {}
        began = time.perf_counter()
        try:
            self._run(way.stage, words)
            seconds = time.perf_counter() - began
            figures = self._run("fidelity", {"model": str(folder / "model.onnx"), **self.measured})
        except StillhouseError as error:
            return {"error": str(error).splitlines()[0][:200]}
        return {"bytes": _bytes_in(folder), "seconds": round(seconds, 1), **figures}

    def _run(self, stage: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return run_stage(stage, arguments, log=self.scratch / f"{stage}.log", share=lambda _: None).result


def _bytes_in(folder: Path) -> int:
    """Bytes of those of a version's files that lie in `folder`."""
    return sum((folder / name).stat().st_size for name in FILES if (folder / name).is_file())


def line(title: str, row: Row) -> str:
    """A row of the table, in Markdown."""
    if "error" in row:
        return f"| {title} | – | {row['error']} | – | – | – |"
    cells = (
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['perplexity_ratio']:.4f}",
        f"{row['kl_mean']:.4f}",
        f"{100 * row['top1_agreement']:.1f}",
        f"{row['decode_perplexity_ratio']:.3f}",
    )
    return f"| {title} | {' | '.join(cells)} |"


def table(rows: dict[str, Row]) -> str:
    """The measured rows in the order of WAYS."""
    head = "| recipe | MB | perplexity ratio | KL (nats a token) | top-1 % | ratio, one-token decode |"
    lines = [head, "|---|---|---|---|---|---|"]
    lines += [line(way.title, rows[name]) for name, way in WAYS.items() if name in rows]
    return "\n".join(lines)


def write_docs(rows: dict[str, Row]) -> None:
    """Puts the table between the marks in docs/quantize.md."""
    text = DOCS.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", "utf-8")


def _entry(stage: str, key: str) -> Path:
    folder = cache_root() / "stages" / f"{stage}-{key[:20]}"
    if not folder.is_dir():
        raise SystemExit(f"error: the {stage} of the demo's model is not cached\nhint: run make demo first")
    return folder


if __name__ == "__main__":
    sys.exit(main())
