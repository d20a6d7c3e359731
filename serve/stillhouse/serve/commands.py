"""`stillhouse serve`, `promote`, `rollback`; mounted by the command line: nothing heavy is imported here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stillhouse.serve.launcher import Server
    from stillhouse.serve.promotion import Promoted

_REPOSITORY = Annotated[Path, typer.Option(help="The model repository.")]
_NAME = Annotated[str, typer.Argument(help="The model's name, for example support-int4.")]
_SERVER = Annotated[str, typer.Option("--url", help="The gRPC address of the server that serves it.")]
_DEFAULT_SERVER = "grpc://127.0.0.1:8001"


def serve(
    repository: _REPOSITORY = Path("model_repository"),
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    triton_host: Annotated[
        str | None,
        typer.Option(
            help="The address of Triton's own ports, which know no keys, where it is another.", show_default="--host"
        ),
    ] = None,
    http_port: Annotated[int, typer.Option(help="Triton's HTTP port; 0: any free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Triton's gRPC port; 0: any free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Triton's metrics port; 0: any free one.")] = 8002,
    openai_port: Annotated[
        int, typer.Option(help="The port of the OpenAI-compatible gateway and its page; 0: no gateway.")
    ] = 9000,
    no_openai: Annotated[bool, typer.Option("--no-openai", help="Serve without the gateway.")] = False,
    api_key: Annotated[
        list[str] | None, typer.Option(help="A key that the gateway's clients must bring; may be repeated.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file of such keys, one a line.")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may ask the gateway, or '*'.")
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(help="Models to serve, separated by commas.", show_default="all"),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Context served, in tokens.", show_default="engine.json"),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(help="Sequences that decode at the same time.", show_default="engine.json"),
    ] = None,
    kv_cache_bytes: Annotated[
        int | None,
        typer.Option(help="Budget of a model's KV cache, in bytes.", show_default="engine.json"),
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(
            help="Requests that may wait for a slot; beyond them it is UNAVAILABLE, 429.",
            show_default="engine.json, then as many as --max-num-seqs, 4 at least",
        ),
    ] = None,
    tritonserver: Annotated[
        Path | None,
        typer.Option(help="A tritonserver binary.", show_default="the embedded one, then PATH"),
    ] = None,
    log_file: Annotated[
        Path | None,
        typer.Option(help="Where the server's own log goes.", show_default="~/.local/state/stillhouse/triton-PORT.log"),
    ] = None,
    grace_s: Annotated[
        float, typer.Option("--grace", min=0.0, help="Seconds that running requests have at the end.")
    ] = 30.0,
) -> None:
    """Serve a model repository from Triton, over HTTP and gRPC, with OpenAI's API beside it; Ctrl-C ends it.

    The gateway's keys may also come in the environment variable STILLHOUSE_API_KEY.

    Example: stillhouse serve --models support-int4 --http-port 8000
    """
    from stillhouse.gateway.gateway import KEY_VARIABLE, Access, read_keys
    from stillhouse.serve.launcher import ServeOptions
    from stillhouse.serve.ports import Ports
    from stillhouse.serve.serving import serve as run

    options = ServeOptions(
        repository=repository,
        host=triton_host or host,
        openai_host=host,
        ports=Ports(http_port, grpc_port, metrics_port),
        models=[name.strip() for name in models.split(",") if name.strip()] if models else None,
        tritonserver=tritonserver,
        engine={
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "kv_cache_bytes": kv_cache_bytes,
            "max_waiting": max_waiting,
        },
        log_file=log_file,
        grace_s=grace_s,
        openai_port=None if no_openai else openai_port or None,
        access=Access(read_keys(api_key or (), api_key_file, os.environ.get(KEY_VARIABLE)), tuple(cors_origin or ())),
    )
    typer.echo(f"starting Triton on {repository} ...", err=True)
    run(options, _announce)


def promote(
    name: _NAME,
    version: Annotated[
        int | None, typer.Argument(min=1, help="The version that is to answer.", show_default=False)
    ] = None,
    built: Annotated[
        Path | None,
        typer.Option(
            help="The version that the build with this --output made, in place of VERSION: it may be live, "
            "and somebody must listen at --url."
        ),
    ] = None,
    keep_previous: Annotated[bool, typer.Option("--keep-previous", help="Keep the version before loaded.")] = False,
    repository: _REPOSITORY = Path("model_repository"),
    url: _SERVER = _DEFAULT_SERVER,
) -> None:
    """Make a version the one that answers: loaded and asked beside the old one, which ends its streams and goes.

    A version that is not whole or does not answer is not promoted, and the old one never stops serving. What is live
    is kept in config.pbtxt; without a running server, that is all that changes.

    Example: stillhouse promote support-int4 2
    """
    from stillhouse.engine.errors import UsageError
    from stillhouse.serve.promotion import built_version
    from stillhouse.serve.promotion import promote as run

    if built is not None:
        if version is not None:
            raise UsageError("VERSION and --built both say which version", hint="give one of them")
        version = built_version(built, name)
    if version is None:
        raise UsageError("which version is to answer is missing", hint=f"stillhouse promote {name} VERSION")
    _tell(run(repository, name, version, url, keep_previous=keep_previous, on_server=built is not None), url)


def rollback(name: _NAME, repository: _REPOSITORY = Path("model_repository"), url: _SERVER = _DEFAULT_SERVER) -> None:
    """Make the version live again that was live before; another rollback takes it back.

    Example: stillhouse rollback support-int4
    """
    from stillhouse.serve.promotion import rollback as run

    _tell(run(repository, name, url), url)


def _tell(promoted: Promoted, url: str) -> None:
    line = f"{promoted.model}/{promoted.version} is live"
    if promoted.previous == promoted.version:
        line += " already"
    elif promoted.previous is not None:
        line += f", before it was {promoted.previous}" + (", which stays loaded" if len(promoted.live) > 1 else "")
    typer.echo(line)
    if not promoted.served:
        typer.echo(f"nobody serves {promoted.model} at {url}: it holds from the next start on", err=True)


def _announce(server: Server) -> None:
    """What someone needs to know of a server that is ready."""
    for line in (
        f"models   {', '.join(map(str, server.models))}",
        f"http     {server.http_url}",
        f"grpc     {server.grpc_url}",
        f"metrics  {server.metrics_url}",
        *(
            (f"openai   {server.openai_url}/v1", f"page     {server.openai_url}")
            if server.openai_url
            else ("openai   none (--no-openai, or --openai-port 0)",)
        ),
        f"log      {server.log_file}",
        "ready; Ctrl-C ends it",
    ):
        typer.echo(line)
