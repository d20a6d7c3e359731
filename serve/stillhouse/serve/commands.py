"""`stillhouse serve`; mounted by the command line, which is why nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stillhouse.serve.launcher import Server


def serve(
    repository: Annotated[Path, typer.Option(help="The model repository.")] = Path("model_repository"),
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Triton's HTTP port; 0: any free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Triton's gRPC port; 0: any free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Triton's metrics port; 0: any free one.")] = 8002,
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
    """Serve a model repository from Triton, over HTTP and gRPC; Ctrl-C ends it.

    Example: stillhouse serve --models support-int4 --http-port 8000
    """
    from stillhouse.serve.launcher import ServeOptions
    from stillhouse.serve.launcher import serve as run
    from stillhouse.serve.ports import Ports

    options = ServeOptions(
        repository=repository,
        host=host,
        ports=Ports(http_port, grpc_port, metrics_port),
        models=[name.strip() for name in models.split(",") if name.strip()] if models else None,
        tritonserver=tritonserver,
        engine={
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "kv_cache_bytes": kv_cache_bytes,
        },
        log_file=log_file,
        grace_s=grace_s,
    )
    typer.echo(f"starting Triton on {repository} ...", err=True)
    run(options, _announce)


def _announce(server: Server) -> None:
    """What someone needs to know of a server that is ready."""
    for line in (
        f"models   {', '.join(map(str, server.models))}",
        f"http     {server.http_url}",
        f"grpc     {server.grpc_url}",
        f"metrics  {server.metrics_url}",
        f"log      {server.log_file}",
        "ready; Ctrl-C ends it",
    ):
        typer.echo(line)
