"""`stillhouse loadtest`; mounted by the command line, which is why nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)

_URL = Annotated[str, typer.Argument(help="host:port or grpc://host:port for gRPC, http://host:port for HTTP.")]
_USERS = Annotated[int, typer.Option(min=1, help="Users that ask at the same time.")]
_DURATION = Annotated[str, typer.Option(help="How long: 15s, 2m.")]
_MAX_TOKENS = Annotated[int, typer.Option(min=1, help="Tokens of an answer.")]
_PROMPTS = Annotated[Path | None, typer.Option(help="JSONL of prompts or messages.", show_default="our own")]
_SEED = Annotated[int, typer.Option(help="Seed of the prompts' order.")]
_METRICS = Annotated[str | None, typer.Option(help="The server's metrics page.", show_default="port 8002 of its host")]
_JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback()
def loadtest() -> None:
    """Drive a server with Locust and print LLM metrics.

    Example: stillhouse loadtest compare localhost:8001 --models support-fp16,support-int8,support-int4
    """


@app.command()
def run(
    url: _URL,
    model: Annotated[str, typer.Option(help="Model to ask.", show_default="the first ending in -int4")] = "",
    users: _USERS = 4,
    duration: _DURATION = "15s",
    max_tokens: _MAX_TOKENS = 64,
    ignore_eos: Annotated[bool, typer.Option(help="Let every answer have exactly --max-tokens tokens.")] = False,
    prompts: _PROMPTS = None,
    seed: _SEED = 0,
    json_output: _JSON = False,
) -> None:
    """Drive one model and print tokens/s, time to first token, time between tokens, end to end.

    Example: stillhouse loadtest run localhost:8001 --model support-int4 --users 8 --duration 30s
    """
    import json

    from stillhouse.loadtest.report import token_table
    from stillhouse.loadtest.run import run_locust

    result = run_locust(
        url,
        model,
        users=users,
        duration_s=parse_duration_s(duration),
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        prompts=prompts,
        seed=seed,
    )
    print(json.dumps(result.to_json(), indent=2) if json_output else token_table([result.summary]))


@app.command()
def compare(
    url: _URL,
    models: Annotated[str, typer.Option(help="Models, separated by commas.", show_default="all that are ready")] = "",
    users: _USERS = 4,
    duration: _DURATION = "15s",
    max_tokens: _MAX_TOKENS = 64,
    prompts: _PROMPTS = None,
    seed: _SEED = 0,
    metrics_url: _METRICS = None,
    repository: Annotated[Path, typer.Option(help="The server's repository, for the sizes.")] = Path(
        "model_repository"
    ),
    json_output: _JSON = False,
) -> None:
    """Drive one model after another and print precision, throughput, latencies, memory and size.

    Example: stillhouse loadtest compare localhost:8001 --models support-fp16,support-int8,support-int4
    """
    import json

    from stillhouse.loadtest.compare import compare_models, comparison_table

    compared = compare_models(
        url,
        [name.strip() for name in models.split(",") if name.strip()],
        users=users,
        duration_s=parse_duration_s(duration),
        max_tokens=max_tokens,
        prompts=prompts,
        seed=seed,
        metrics_url=metrics_url,
        repository=repository,
        progress=lambda line: typer.echo(line, err=True),
    )
    print(json.dumps([c.to_json() for c in compared], indent=2) if json_output else comparison_table(compared))


def parse_duration_s(text: str) -> float:
    """Seconds in "15", "15s", "2m" or "1h". Raises BadInput."""
    from stillhouse.loadtest.errors import BadInput

    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    if not number.isdecimal() or int(number) < 1:
        raise BadInput(f"a duration is a whole number of s, m or h, got {text!r}", hint="for example 15s or 2m")
    return float(int(number) * unit)
