"""`stillhouse generate` and `stillhouse chat`; mounted by the command line. Only the answer goes to stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from stillhouse.client.types import Token

_URL = Annotated[str, typer.Argument(help="host:port or grpc://host:port for gRPC, http://host:port for HTTP.")]
_MODEL = Annotated[str, typer.Argument(help="The model's name, for example support-int4.")]
_VERSION = Annotated[str | None, typer.Option(help="The model's version.", show_default="the live one")]
_MAX_TOKENS = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
_TEMPERATURE = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
_SEED = Annotated[int | None, typer.Option(help="Seed of the sampling.", show_default="a new one each time")]


def generate(
    url: _URL,
    model: _MODEL,
    prompt: Annotated[str, typer.Option(help="The question; - reads it from stdin.")],
    system: Annotated[str | None, typer.Option(help="The system message before it.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt as it is, without the chat template.")] = False,
    version: _VERSION = None,
    max_tokens: _MAX_TOKENS = 256,
    temperature: _TEMPERATURE = 0.0,
    seed: _SEED = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print text, counts and times as JSON.")] = False,
) -> None:
    """Ask a served model one question; the answer is printed as it comes.

    Example: stillhouse generate localhost:8001 support-int4 --prompt "May I return the boots?"
    """
    from stillhouse.client.errors import InvalidCall
    from stillhouse.client.sync import Client

    if raw and system is not None:
        raise InvalidCall("--raw sends no system message", hint="leave out --raw or --system")
    text = sys.stdin.read() if prompt == "-" else prompt
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    asked: dict[str, Any] = {"prompt": text} if raw else {"messages": messages}
    with Client(url) as client:
        tokens = client.stream(model, version=version, **asked, **_sampling(max_tokens, temperature, seed))
        if json_output:
            _print_json(tokens)
        else:
            _print_text(tokens)


def chat(
    url: _URL,
    model: _MODEL,
    system: Annotated[str | None, typer.Option(help="The system message at the beginning.")] = None,
    version: _VERSION = None,
    max_tokens: _MAX_TOKENS = 256,
    temperature: _TEMPERATURE = 0.0,
    seed: _SEED = None,
) -> None:
    """Talk with a served model, turn by turn; an empty line or Ctrl-D ends it.

    Example: stillhouse chat localhost:8001 support-int4
    """
    from stillhouse.client.sync import Client

    messages = [{"role": "system", "content": system}] if system is not None else []
    with Client(url) as client:
        while text := _ask_for_a_line():
            messages.append({"role": "user", "content": text})
            sampling = _sampling(max_tokens, temperature, seed)
            answer = _print_text(client.stream(model, messages=messages, version=version, **sampling))
            messages.append({"role": "assistant", "content": answer})


def _ask_for_a_line() -> str:
    # The mark goes to stderr, so that stdout holds the answers alone.
    print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _sampling(max_tokens: int, temperature: float, seed: int | None) -> dict[str, Any]:
    sampling: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    return sampling if seed is None else {**sampling, "seed": seed}


def _print_text(tokens: Iterable[Token]) -> str:
    """Prints the text as it comes; returns it whole."""
    texts = []
    for token in tokens:
        print(token.text, end="", flush=True)
        texts.append(token.text)
    print()
    return "".join(texts)


def _print_json(tokens: Iterable[Token]) -> None:
    import json

    received = list(tokens)
    last = received[-1]  # there is one: an answer without any is an error
    value = {
        "text": "".join(token.text for token in received),
        "finish_reason": last.finish_reason,
        "num_input_tokens": last.num_input_tokens,
        "num_output_tokens": last.num_output_tokens,
        "cumulative_logprob": last.cumulative_logprob,
        "ttft_s": received[0].time_s,
        "e2e_s": last.time_s,
    }
    print(json.dumps(value, ensure_ascii=False, indent=2))
