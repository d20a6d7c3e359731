"""Our own options of a Locust run; Locust shows them in its web form too, but for those that name files to write."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from locust.argument_parser import LocustArgumentParser

from stillhouse.loadtest.arrivals import POISSON, Stage
from stillhouse.loadtest.errors import BadInput
from stillhouse.loadtest.prompts import Workload, load_workload
from stillhouse.loadtest.recount import CountTokens, load_counter
from stillhouse.loadtest.shapes import Shape, load_shape
from stillhouse.loadtest.slo import Slo, parse_slo
from stillhouse.loadtest.synthetic import parse_synthetic


def add_options(parser: LocustArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="", help="Model to ask (default: the server's first model ending in -int4, else its first)")
    add("--model-version", default="", help="Version of the model (default: the live one; Triton only)")
    add("--api-key", default="", is_secret=True, help="Key of an OpenAI API (default: OPENAI_API_KEY)")
    add(
        "--prompts",
        default="",
        metavar="FILE",
        help="JSONL of prompts or messages, ShareGPT, or a trace (default: ours)",
    )
    add("--synthetic", default="", metavar="LENGTHS", help='Made-up prompts: "input=256, output=normal(64, 16)"')
    add("--system-prompt", default="", metavar="TEXT", help="One before every prompt; @FILE reads it from a file")
    add(
        "--rate",
        type=float,
        default=0.0,
        help="Open loop: requests a second, whatever the server does (0: closed loop)",
    )
    add("--arrivals", default=POISSON, help="Of an open loop: poisson or constant (default: poisson)")
    add("--stages", default="", metavar="SHAPE", help="Load that changes: ramp, steps, spike, soak, or a TOML file")
    add("--max-tokens", type=int, default=64, help="Longest answer, in tokens (default: 64)")
    add("--ignore-eos", action="store_true", help="Let every answer have exactly --max-tokens tokens")
    add("--no-stream", action="store_true", help="Ask for whole answers: end to end only, no TTFT")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    add("--seed", type=int, default=0, help="Seed of prompts, arrivals and sampling (default: 0)")
    add("--tokenizer", default="", metavar="FILE", help="A tokenizer.json that checks how the server counts tokens")
    add("--slo", default="", help='Objective: "ttft_p95<200ms, itl_p95<50ms, errors<1%%"')
    add("--timeout", type=float, default=300.0, help="Seconds that a whole answer may take, its first token too")
    add("--token-timeout", type=float, default=30.0, help="Seconds without a next token that fail a request")
    add("--result", default="", metavar="FILE", include_in_web_ui=False, help="Write the figures as JSON")
    add("--progress", default="", metavar="FILE", include_in_web_ui=False, help="Write how far it is, again and again")


def api_key_of(options: Namespace) -> str:
    return str(options.api_key or os.environ.get("OPENAI_API_KEY", ""))


def sampling_of(options: Namespace) -> dict[str, Any]:
    """What every request says of sampling."""
    sampling: dict[str, Any] = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    if options.temperature > 0:
        sampling["seed"] = options.seed
    if options.ignore_eos:
        sampling["ignore_eos"] = True
    return sampling


def slo_of(options: Namespace) -> Slo | None:
    return parse_slo(options.slo, streamed=not options.no_stream)


def counter_of(options: Namespace) -> CountTokens | None:
    return load_counter(Path(options.tokenizer) if options.tokenizer else None)


def workload_of(options: Namespace) -> Workload:
    path = Path(options.prompts) if options.prompts else None
    return load_workload(path, parse_synthetic(options.synthetic), _system_prompt(options.system_prompt), options.seed)


def shape_of(options: Namespace) -> Shape | None:
    """The load over time; None for a closed loop of a fixed number of users. Raises BadInput."""
    if not 0 <= options.rate < math.inf:
        raise BadInput(f"a rate is requests a second from 0 (closed loop), got {options.rate:g}")
    if options.stages:
        return load_shape(options.stages, options.rate or None)
    return Shape((Stage(0.0, options.rate, options.rate),), in_users=False, for_ever=True) if options.rate else None


def _system_prompt(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the system prompt {text[1:]}: {error}") from None
