"""What a load is, in the command line's words: said here once, for all commands that take some of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from stillhouse.loadtest.errors import BadInput
from stillhouse.loadtest.load import Load
from stillhouse.loadtest.words import parse_rate

# Of a field of Load: its type and option.
_OPTIONS: Mapping[str, Any] = {
    "users": Annotated[
        int | None,
        typer.Option(min=1, help="Closed loop: users that ask at the same time.", show_default=str(Load.users)),
    ],
    "rate": Annotated[
        float, typer.Option(parser=parse_rate, metavar="RATE", help="Open loop: requests/s, whatever the server does.")
    ],
    "arrivals": Annotated[str, typer.Option(help="Of an open loop: poisson or constant.")],
    "max_tokens": Annotated[int, typer.Option(min=1, help="Tokens of an answer.")],
    "ignore_eos": Annotated[bool, typer.Option(help="Let every answer have exactly --max-tokens tokens.")],
    "stream": Annotated[bool, typer.Option(help="Ask for streams; else for whole answers, without TTFT.")],
    "prompts": Annotated[
        Path | None, typer.Option(help="JSONL of prompts or messages, ShareGPT, or a trace.", show_default="our own")
    ],
    "synthetic": Annotated[str, typer.Option(help='Made-up prompts: "input=256, output=normal(64, 16)".')],
    "system_prompt": Annotated[str, typer.Option(help="One before every prompt; @FILE reads it from a file.")],
    "temperature": Annotated[float, typer.Option(min=0, help="0 is greedy.")],
    "seed": Annotated[int, typer.Option(help="Seed of prompts, arrivals and sampling.")],
    "slo": Annotated[str, typer.Option(help='Objective: "ttft_p95<200ms, itl_p95<50ms, errors<1%".')],
    "tokenizer": Annotated[
        Path | None, typer.Option(help="A tokenizer.json that checks how the server counts tokens.", metavar="FILE")
    ],
    "timeout_s": Annotated[
        float, typer.Option("--timeout", help="Seconds that a whole answer may take, its first token too.")
    ],
    "token_timeout_s": Annotated[
        float, typer.Option("--token-timeout", help="Seconds without a next token that fail a request.")
    ],
    "stop_timeout_s": Annotated[
        int,
        typer.Option(
            "--stop-timeout", min=0, help="Open loop: seconds that the last answers may take after the last arrival."
        ),
    ],
    "protocol": Annotated[str, typer.Option(help="triton or openai.", show_default="found out from the URL")],
    "model_version": Annotated[str, typer.Option(help="Of the model; Triton only.", show_default="the live one")],
    "processes": Annotated[int, typer.Option(min=1, help="Processes that make the load.")],
}


def takes_load(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Lets a command's parameter `load` be options: one for each field of Load, but for those in `without`."""
    names = [name for name in _OPTIONS if name not in without]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            _refuse_two_loops(given)
            fields = {name: given.pop(name) for name in names}
            command(load=Load(**{name: value for name, value in fields.items() if value is not None}), **given)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            parameters += [_parameter(name) for name in names] if parameter.name == "load" else [parameter]
        # Typer reads both: a signature for the defaults and the order, annotations for the types.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _refuse_two_loops(given: Mapping[str, Any]) -> None:
    if given.get("rate") and given.get("users"):
        hint = "leave out --users or --rate"
        raise BadInput("users are a closed loop and a rate is an open one: a run is one of them", hint=hint)


def _parameter(name: str) -> inspect.Parameter:
    # Whether a number of users was said is to be known: beside a rate it makes no sense.
    default = None if name == "users" else Load.__dataclass_fields__[name].default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_OPTIONS[name])
