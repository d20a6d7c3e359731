"""A 1.5B within 2 GB: `edge serve --max-memory 2GB` and one user, on synthetic weights.

    python benchmarks/one_user.py --write-docs

The version has DeepSeek-R1-Distill-Qwen-1.5B's shape and random weights in INT4, as `stillhouse build` leaves it
(synthetic_model.py; cached; some 8 GB of disk meanwhile). The service is started twice: as the first one on a device,
which packs the weights and is asked something short, and as any later one, which is asked a long prompt. Peak RSS is
the kernel's own (VmHWM), of the only process there is. What the KV cache would take beyond it in a context that is full
is reckoned: it is memory that is touched as it is used.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import publish
from machine import describe
from roster import CACHE, HERE, ROOT
from synthetic_model import SHAPE, version_of

from stillhouse.engine.directory import open_version

DOCS, BEGIN, END = ROOT / "docs/edge.md", "<!-- one user: begin -->", "<!-- one user: end -->"
LIMIT = "2GB"
MODEL = "synthetic-int4"


def serve_one(version: Path, cache: Path, prompt_tokens: int, answer_tokens: int) -> dict[str, Any]:
    """Starts the service, asks it, and tells what it held meanwhile."""
    command = [sys.executable, "-m", "stillhouse.cli.main", "edge", "serve", str(version), "--port", "0"]
    begun_s = time.perf_counter()
    with subprocess.Popen(
        [*command, "--max-memory", LIMIT],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("ready"):
                break
        try:
            ready_s, text = time.perf_counter() - begun_s, "".join(said)
            url, derived = re.search(r"^openai\s+(\S+)", text, re.M), re.search(r"context (\d+) tokens, (\d+) at", text)
            if url is None or derived is None:
                raise SystemExit(text)
            context = int(derived[1])
            loaded = held(process.pid)
            answer = ask(url[1], prompt_tokens, answer_tokens)
            unused = context - prompt_tokens - answer_tokens
            return {
                "ready_s": ready_s,
                "prompt_tokens": prompt_tokens,
                "unused_kv_bytes": unused * open_version(version, verify=False).manifest.memory.kv_bytes_per_token,
                "context_tokens": context,
                "at_a_time": int(derived[2]),
                "loaded": loaded,
                "answered": held(process.pid),
                **answer,
            }
        finally:
            process.terminate()


def ask(url: str, prompt_tokens: int, answer_tokens: int) -> dict[str, Any]:
    """One streamed answer to a prompt of random tokens: seconds to its first token, and tokens/s from there."""
    prompt = np.random.default_rng(7).integers(1000, 40_000, prompt_tokens).tolist()
    body = {"model": MODEL, "prompt": prompt, "max_tokens": answer_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    begun_s = time.perf_counter()
    moments, usage = [], {}
    with urllib.request.urlopen(request, timeout=1800) as response:
        for line in response:
            if line.startswith(b"data: {"):
                moments.append(time.perf_counter())
                usage = json.loads(line[6:]).get("usage") or usage
    assert usage["completion_tokens"] == answer_tokens, usage
    return {"first_token_s": moments[0] - begun_s, "tokens_per_s": (answer_tokens - 1) / (moments[-1] - moments[0])}


def held(pid: int) -> dict[str, int]:
    """Bytes that a process holds, by its kernel's names: VmHWM (the most RSS ever), RssAnon, RssFile."""
    lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {name: int(values[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon", "RssFile")}


def markdown(report: dict[str, Any]) -> str:
    first, later = report["first"], report["later"]
    both = (first, later)
    rows = [
        ("files", f"{report['model_bytes'] / 1e6:,.0f} MB", ""),
        ("context, answers at a time", *(f"{each['context_tokens']:,}, {each['at_a_time']}" for each in both)),
        ("prompt", *(f"{each['prompt_tokens']:,} tokens" for each in both)),
        ("**peak RSS**", *(f"**{each['answered']['VmHWM'] / 1e6:,.0f} MB**" for each in both)),
        ("of it when loaded", *(f"{each['loaded']['VmHWM'] / 1e6:,.0f} MB" for each in both)),
        ("at the end: of no file", *(f"{each['answered']['RssAnon'] / 1e6:,.0f} MB" for each in both)),
        ("at the end: mapped", *(f"{each['answered']['RssFile'] / 1e6:,.0f} MB" for each in both)),
        ("a full context would add", *(f"{each['unused_kv_bytes'] / 1e6:,.0f} MB" for each in both)),
        ("start to ready", *(f"{each['ready_s']:.1f} s" for each in both)),
        ("decode", *(f"{each['tokens_per_s']:.1f} tokens/s" for each in both)),
    ]
    lines = ["| | first start on a device | later starts |", "|---|--:|--:|"]
    lines += [f"| {name} | {one} | {other} |" for name, one, other in rows]
    machine = report["machine"]
    about = f"{machine['processor']}, {machine['cores']} cores. Measured {report['measured']}."
    return "\n".join([*lines, "", f"Machine: {about}"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "model_repository/support-int4/1")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer: to try it out")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="of the later start")
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=HERE / "results/one_user.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/edge.md")
    args = parser.parse_args()
    version = version_of(args.layers, args.tokenizer)
    with tempfile.TemporaryDirectory(dir=CACHE) as cache:
        first = serve_one(version, Path(cache), 16, args.answer_tokens)
        print("first start:", json.dumps(first), file=sys.stderr, flush=True)
        later = serve_one(version, Path(cache), args.prompt_tokens, args.answer_tokens)
    report = {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(),
        "limit": LIMIT,
        "model_bytes": sum((version / name).stat().st_size for name in ("model.onnx", "model.onnx.data")),
        "first": first,
        "later": later,
    }
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)


if __name__ == "__main__":
    main()
