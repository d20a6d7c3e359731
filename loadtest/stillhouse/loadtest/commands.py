"""`stillhouse loadtest`; mounted by the command line, which is why nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from stillhouse.loadtest.load import Load
from stillhouse.loadtest.load_options import takes_load

app = typer.Typer(no_args_is_help=True)

_URL = Annotated[
    str, typer.Argument(help="host:port for Triton's gRPC; http://host:port for its HTTP or an OpenAI API, found out.")
]
_MODEL = Annotated[str, typer.Option(help="Model to ask.", show_default="the first ending in -int4")]
_KEY = Annotated[str, typer.Option(help="Key of an OpenAI API.", envvar="OPENAI_API_KEY", show_envvar=True)]
_METRICS = Annotated[
    str | None, typer.Option(help="The server's metrics page.", show_default="Triton: port 8002; OpenAI API: /metrics")
]


def _check_name(name: Path | None) -> Path | None:
    """At once: a run's figures are not to be lost for want of a folder."""
    if name is not None:
        from stillhouse.loadtest.save import check_name

        check_name(name)
    return name


_SAVE = Annotated[
    Path | None,
    typer.Option(help="Write NAME.json, NAME.csv and NAME.html.", metavar="NAME", callback=_check_name),
]
_JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback()
def loadtest() -> None:
    """Drive a server with Locust and print LLM metrics.

    Example: stillhouse loadtest compare localhost:8001 --models support-fp16,support-int8,support-int4
    """


@app.command()
@takes_load()
def run(
    *,
    url: _URL,
    model: _MODEL = "",
    duration: Annotated[
        str | None, typer.Option(help="How long: 15s, 2m.", show_default="15s; a trace: as long as it is")
    ] = None,
    load: Load,
    api_key: _KEY = "",
    metrics_url: _METRICS = None,
    save: _SAVE = None,
    json_output: _JSON = False,
) -> None:
    """Drive one model and print tokens/s, time to first token, time between tokens, end to end.

    Example: stillhouse loadtest run localhost:8001 --rate 4 --duration 60s --slo "ttft_p95<200ms" --save monday
    """
    from stillhouse.loadtest.run import run_locust
    from stillhouse.loadtest.show import progress, show
    from stillhouse.loadtest.words import duration_of

    load = replace(load, duration_s=duration_of(duration, load.prompts))
    show(run_locust(url, model, load, metrics_url=metrics_url, api_key=api_key, progress=progress), save, json_output)


@app.command()
@takes_load("users")
def shape(
    *,
    stages: Annotated[str, typer.Argument(help="ramp, steps, spike, soak (of --rate), or a TOML file of stages.")],
    url: _URL,
    model: _MODEL = "",
    load: Load,
    api_key: _KEY = "",
    metrics_url: _METRICS = None,
    save: _SAVE = None,
    json_output: _JSON = False,
) -> None:
    """Drive one model with a load that changes, and print the figures of each stage.

    Example: stillhouse loadtest shape steps localhost:8001 --rate 4 --save steps
    """
    from stillhouse.loadtest.page import stage_steps
    from stillhouse.loadtest.report import step_table
    from stillhouse.loadtest.run import run_locust
    from stillhouse.loadtest.shapes import load_shape
    from stillhouse.loadtest.show import progress, show

    found = load_shape(stages, load.rate or None)
    load = replace(load, stages=stages, duration_s=found.duration_s)
    result = run_locust(url, model, load, metrics_url=metrics_url, api_key=api_key, progress=progress)
    show(result, save, json_output, also="" if json_output else step_table(stage_steps(result)))


@app.command()
@takes_load("users", "rate", "arrivals")
def capacity(
    *,
    url: _URL,
    model: _MODEL = "",
    start: Annotated[float, typer.Option(help="The rate that the search begins with, in requests/s.")] = 1.0,
    duration: Annotated[str, typer.Option(help="How long one rate is tried (and for 40 requests at least).")] = "20s",
    quick: Annotated[bool, typer.Option(help="To 25 % instead of 10 %, 25 requests at least, one repeat.")] = False,
    load: Load,
    api_key: _KEY = "",
    metrics_url: _METRICS = None,
    save: _SAVE = None,
    json_output: _JSON = False,
) -> None:
    """Find the highest rate of requests at which the server keeps an objective (--slo), and the goodput there.

    Example: stillhouse loadtest capacity localhost:8001 --slo "ttft_p95<200ms, itl_p95<50ms"
    """
    from stillhouse.loadtest.capacity import QUICK, THOROUGH, Capacity, find_capacity
    from stillhouse.loadtest.run import LoadResult
    from stillhouse.loadtest.show import show_capacity, tell
    from stillhouse.loadtest.words import parse_duration_s

    load = replace(load, duration_s=parse_duration_s(duration))
    probes: list[LoadResult] = []
    found: Capacity | None = None
    try:
        found = find_capacity(
            url,
            model,
            load,
            start=start,
            effort=QUICK if quick else THOROUGH,
            metrics_url=metrics_url,
            api_key=api_key,
            progress=tell,
            probes=probes,
        )
    finally:
        # Also what was tried before an error or an interrupt.
        show_capacity(found or Capacity.without_end(probes), save, json_output)


@app.command()
@takes_load("ignore_eos", "model_version", "slo")
def compare(
    *,
    url: _URL,
    models: Annotated[str, typer.Option(help="Models, separated by commas.", show_default="all that are ready")] = "",
    duration: Annotated[str, typer.Option(help="How long each model is driven in one round.")] = "15s",
    rounds: Annotated[int, typer.Option(min=1, help="How often; the models take turns.")] = 1,
    ignore_eos: Annotated[bool, typer.Option(help="Every answer has exactly --max-tokens tokens.")] = True,
    load: Load,
    api_key: _KEY = "",
    metrics_url: _METRICS = None,
    repository: Annotated[Path, typer.Option(help="The server's repository, for the sizes.")] = Path(
        "model_repository"
    ),
    save: _SAVE = None,
    json_output: _JSON = False,
) -> None:
    """Drive models in turns and print precision, throughput, ratio to FP16, latencies, memory and size.

    Example: stillhouse loadtest compare localhost:8001 --models support-fp16,support-int8,support-int4 --rounds 3
    """
    from stillhouse.loadtest.compare import Compared, compare_models
    from stillhouse.loadtest.show import show_comparison, tell
    from stillhouse.loadtest.words import parse_duration_s

    compared: list[Compared] = []
    try:
        compare_models(
            url,
            [name.strip() for name in models.split(",") if name.strip()],
            replace(load, duration_s=parse_duration_s(duration)),
            rounds=rounds,
            ignore_eos=ignore_eos,
            api_key=api_key,
            metrics_url=metrics_url,
            repository=repository,
            progress=tell,
            compared=compared,
        )
    finally:
        # Also what came before an error or an interrupt.
        show_comparison(compared, save, json_output)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="JSON of loadtest run --save: before.")],
    b: Annotated[Path, typer.Argument(help="JSON of loadtest run --save: after.")],
    fail_over: Annotated[str, typer.Option(help="Exit 1 where B is worse by more than this, and not by chance.")] = "",
    json_output: _JSON = False,
) -> None:
    """Show what changed between two runs, with bootstrap intervals.

    Example: stillhouse loadtest diff monday.json tuesday.json --fail-over 10%
    """
    import json

    from stillhouse.loadtest.diff import changes, diff_table, different_settings, read_run, worse
    from stillhouse.loadtest.errors import Missed
    from stillhouse.loadtest.show import tell
    from stillhouse.loadtest.words import parse_share

    share = parse_share(fail_over) if fail_over else None
    before, after = read_run(a), read_run(b)
    found = changes(before.samples, after.samples)
    print(json.dumps([one.to_json() for one in found], indent=2) if json_output else diff_table(found))
    doubts = [f"{path}: {doubt}" for path, saved in ((a, before), (b, after)) for doubt in saved.doubts]
    doubts_and_more = [*doubts, *(f"the settings differ: {one}" for one in different_settings(before, after))]
    for doubt in doubts_and_more:
        tell(f"warning: {doubt}")
    if share is not None and (beyond := worse(found, share)):
        raise Missed(f"worse by more than {fail_over}: {', '.join(map(str, beyond))}")
    if share is not None and doubts:
        raise Missed(f"these runs say nothing of {fail_over}: {doubts[0]}", hint="compare whole and valid runs")
