"""`stillhouse edge …`: a version directory answers on this device, without a server."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stillhouse.gateway.server import GatewayServer

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


@app.command()
def serve(
    directories: Annotated[list[Path], typer.Argument(help="Version directories: MODEL/VERSION, one a model.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0: any free one.")] = 9000,
    max_model_len: Annotated[int | None, typer.Option(help="Context served, in tokens.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences that decode at the same time.")] = None,
    kv_cache_bytes: Annotated[int | None, typer.Option(help="Budget of a model's KV cache, in bytes.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="ONNX Runtime's threads; one a core by default.")] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="A key that clients must bring; may be repeated.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file of such keys, one a line.")] = None,
    cors_origin: Annotated[list[str] | None, typer.Option(help="An origin whose pages may ask, or '*'.")] = None,
    grace_s: Annotated[float, typer.Option("--grace", min=0.0, help="Seconds for running requests at the end.")] = 30.0,
) -> None:
    """Serve versions over HTTP in OpenAI's API, with a page to try them at /; Ctrl-C ends it.

    Keys may also come in the environment variable STILLHOUSE_API_KEY.

    Example: stillhouse edge serve model_repository/support-int4/1 --port 9000
    """
    from stillhouse.edge.runtime import require_onnxruntime

    require_onnxruntime()
    from stillhouse.edge.serving import serve as run
    from stillhouse.engine.options import read_options
    from stillhouse.gateway.gateway import KEY_VARIABLE, Access, read_keys

    keys = read_keys(api_key or (), api_key_file, os.environ.get(KEY_VARIABLE))
    overrides: dict[str, object] = {
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "kv_cache_bytes": kv_cache_bytes,
        "threads": threads,
    }
    versions = [(directory, read_options(directory.resolve().parent, overrides)) for directory in directories]
    typer.echo(f"loading {', '.join(map(str, directories))} ...", err=True)
    run(versions, host, port, Access(keys, tuple(cors_origin or ())), grace_s, _announce)


def _announce(server: GatewayServer) -> None:
    models = ", ".join(f"{model.name}/{model.version}" for model in server.gateway.models())
    for line in (f"models   {models}", f"openai   {server.url}/v1", f"page     {server.url}", "ready; Ctrl-C ends it"):
        typer.echo(line)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
