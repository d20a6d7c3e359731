"""`stillhouse edge …`: a version directory answers on this device, without a server.

What looks after the device and its versions (doctor, bench, pull, bundle) is in device_commands.py.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse.edge import device_commands

if TYPE_CHECKING:
    from stillhouse.gateway.server import GatewayServer

app = typer.Typer(no_args_is_help=True, add_completion=False)

_VERSION = Annotated[Path, typer.Argument(help="A version directory: model_repository/NAME-PRECISION/VERSION.")]
_MAX_TOKENS = Annotated[int, typer.Option(help="Most tokens of answer.")]
_TEMPERATURE = Annotated[float, typer.Option(help="0 is greedy.")]
_TOP_P = Annotated[float, typer.Option(help="Nucleus sampling: the share of probability kept.")]
_TOP_K = Annotated[int, typer.Option(help="The most likely tokens kept; 0 keeps all.")]
_SEED = Annotated[int | None, typer.Option(help="Makes a sampled answer repeatable.")]
_THREADS = Annotated[int | None, typer.Option(min=1, help="ONNX Runtime's threads; one a core by default.")]
_PROVIDER = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda or tensorrt, and no other; auto: the one it was built for, else the CPU.", show_default="auto"
    ),
]
_MAX_MEMORY = Annotated[
    str | None,
    typer.Option(help="Memory to stay within, like 2GB: context and concurrency follow.", show_default="no limit"),
]
_MAX_MODEL_LEN = Annotated[int | None, typer.Option(help="Context served, in tokens.")]


@app.callback()
def edge() -> None:
    """Run a version on this device, without a server.

    Example: stillhouse edge generate model_repository/support-int4/1 --prompt "How do I return a parcel?"
    """


@app.command()
def generate(
    directory: _VERSION,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question; '-' reads standard input.")],
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt as it is, without the chat template.")] = False,
    max_tokens: _MAX_TOKENS = 256,
    temperature: _TEMPERATURE = 0.0,
    top_p: _TOP_P = 1.0,
    top_k: _TOP_K = 0,
    seed: _SEED = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the answer before this text; may be repeated.")] = None,
    threads: _THREADS = None,
    provider: _PROVIDER = None,
    max_memory: _MAX_MEMORY = None,
    max_model_len: _MAX_MODEL_LEN = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print token counts and times to stderr.")] = False,
) -> None:
    """Answer one prompt, streaming to the terminal. Only the answer goes to stdout.

    Example: stillhouse edge generate model_repository/support-int4/1 --prompt "How do I return a parcel?"
    """
    from stillhouse.edge.memory import limit_of
    from stillhouse.engine.sampling import SamplingParams

    question = sys.stdin.read() if prompt == "-" else prompt
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=tuple(stop or ())
    )
    limit_bytes = limit_of(max_memory)
    from stillhouse.edge.loading import ONE_ANSWER, load

    began_s = time.perf_counter()
    options = {**ONE_ANSWER, "threads": threads, "provider": provider, "max_model_len": max_model_len}
    with load(directory, options, limit_bytes) as model:
        loaded_s = time.perf_counter()
        messages = [{"role": "user", "content": question}]
        prompt_ids = model.prompt_ids(text=question) if raw else model.prompt_ids(messages=messages)
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
def chat(
    directory: _VERSION,
    system: Annotated[str | None, typer.Option(help="The system message at the beginning.")] = None,
    max_tokens: _MAX_TOKENS = 256,
    temperature: _TEMPERATURE = 0.0,
    top_p: _TOP_P = 1.0,
    top_k: _TOP_K = 0,
    seed: _SEED = None,
    threads: _THREADS = None,
    provider: _PROVIDER = None,
    max_memory: _MAX_MEMORY = None,
    max_model_len: _MAX_MODEL_LEN = None,
) -> None:
    """Talk with the model, turn by turn; thoughts are dimmed, Ctrl-C stops an answer, Ctrl-D ends.

    Example: stillhouse edge chat model_repository/support-int4/1
    """
    from stillhouse.edge.memory import limit_of
    from stillhouse.engine.sampling import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    limit_bytes = limit_of(max_memory)
    from stillhouse.edge.chatting import talk
    from stillhouse.edge.loading import ONE_ANSWER, load

    options = {**ONE_ANSWER, "threads": threads, "provider": provider, "max_model_len": max_model_len}
    with load(directory, options, limit_bytes) as model:
        talk(model, params, system)


@app.command()
def serve(
    directories: Annotated[
        list[Path],
        typer.Argument(help="MODEL: its live version, updates are followed; MODEL/VERSION: that one. One a model."),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0: any free one.")] = 9000,
    max_model_len: _MAX_MODEL_LEN = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences that decode at the same time.")] = None,
    kv_cache_bytes: Annotated[int | None, typer.Option(help="Budget of a model's KV cache, in bytes.")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Requests that may wait for one of these.")] = None,
    max_memory: _MAX_MEMORY = None,
    threads: _THREADS = None,
    provider: _PROVIDER = None,
    api_key: Annotated[list[str] | None, typer.Option(help="A key that clients must bring; may be repeated.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file of such keys, one a line.")] = None,
    cors_origin: Annotated[list[str] | None, typer.Option(help="An origin whose pages may ask, or '*'.")] = None,
    grace_s: Annotated[float, typer.Option("--grace", min=0.0, help="Seconds for running requests at the end.")] = 30.0,
) -> None:
    """Serve versions over HTTP in OpenAI's API, with a page to try them at /; Ctrl-C ends it.

    Given a model's directory, it serves the live version and switches when 'stillhouse edge pull' has brought a newer
    one; requests that run end on the version that they began with. Several models share --max-memory equally. Keys may
    also come in the environment variable STILLHOUSE_API_KEY.

    Example: stillhouse edge serve model_repository/support-int4 --max-memory 2GB
    """
    from stillhouse.edge.memory import limit_of, share_of
    from stillhouse.edge.runtime import require_onnxruntime

    limit_bytes = limit_of(max_memory)
    if limit_bytes is not None:
        if kv_cache_bytes is not None:
            raise typer.BadParameter("--kv-cache-bytes follows from --max-memory: give one of them")
        limit_bytes = share_of(limit_bytes, len(directories))
    require_onnxruntime()
    from stillhouse.edge.following import Place
    from stillhouse.edge.loading import load
    from stillhouse.edge.serving import serve as run
    from stillhouse.gateway.gateway import KEY_VARIABLE, Access, read_keys

    keys = read_keys(api_key or (), api_key_file, os.environ.get(KEY_VARIABLE))
    options: dict[str, object] = {
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "kv_cache_bytes": kv_cache_bytes,
        "max_waiting": max_waiting,
        "threads": threads,
        "provider": provider,
    }
    typer.echo(f"loading {', '.join(map(str, directories))} ...", err=True)
    places = [Place.of(directory) for directory in directories]
    for place in places:
        if not place.follows:
            typer.echo(
                f"{place.directory} and no other version; updates are followed of {place.directory.parent}", err=True
            )
    loading = functools.partial(load, overrides=options, limit_bytes=limit_bytes)
    run(places, loading, host, port, Access(keys, tuple(cors_origin or ())), grace_s, _announce)


for _command in (device_commands.doctor, device_commands.bench, device_commands.pull, device_commands.bundle):
    app.command()(_command)


def _announce(server: GatewayServer) -> None:
    models = ", ".join(f"{model.name}/{model.version}" for model in server.gateway.models())
    for line in (f"models   {models}", f"openai   {server.url}/v1", f"page     {server.url}", "ready; Ctrl-C ends it"):
        typer.echo(line)
