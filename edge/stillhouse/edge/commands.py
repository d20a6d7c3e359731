"""`stillhouse edge …`: a version directory answers on this device, without a server."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def edge() -> None:
    """Run a version on this device, without a server.

    Example: stillhouse edge generate model_repository/support-int4/1 --prompt "How do I return a parcel?"
    """


@app.command()
def generate(
    directory: Annotated[Path, typer.Argument(help="A version directory: model_repository/NAME-PRECISION/VERSION.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question; '-' reads standard input.")],
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt as it is, without the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling: the share of probability kept.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="The most likely tokens kept; 0 keeps all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Makes a sampled answer repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the answer before this text; may be repeated.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="ONNX Runtime's threads; one a core by default.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print token counts and times to stderr.")] = False,
) -> None:
    """Answer one prompt, streaming to the terminal. Only the answer goes to stdout.

    Example: stillhouse edge generate model_repository/support-int4/1 --prompt "How do I return a parcel?"
    """
    from stillhouse.edge.runtime import require_onnxruntime
    from stillhouse.engine.sampling import SamplingParams

    question = sys.stdin.read() if prompt == "-" else prompt
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=tuple(stop or ())
    )
    require_onnxruntime()
    from stillhouse.engine.model import LanguageModel
    from stillhouse.engine.options import read_options

    began_s = time.perf_counter()
    # One sequence: no more of the device's memory than this answer needs.
    options = read_options(directory.resolve().parent, {"threads": threads, "max_num_seqs": 1})
    with LanguageModel.load(directory, options) as model:
        loaded_s = time.perf_counter()
        prompt_ids = model.prompt_ids(text=question) if raw else model.prompt_ids(messages=[_user(question)])
        first_s = None
        for chunk in model.stream(prompt_ids, params):
            first_s = first_s or time.perf_counter()
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
        ended_s = time.perf_counter()
        sys.stdout.write("\n")
    if stats and first_s is not None:
        tokens = chunk.num_output_tokens
        between_ms = f"{(ended_s - first_s) / (tokens - 1) * 1000:.1f}" if tokens > 1 else "-"
        print(
            f"load {loaded_s - began_s:.2f} s, prompt {chunk.num_prompt_tokens} tokens, answer {tokens} tokens,"
            f" TTFT {(first_s - loaded_s) * 1000:.0f} ms, between tokens {between_ms} ms",
            file=sys.stderr,
        )


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
