"""`stillhouse generate` and `stillhouse chat`: a served model answers in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

_URL = Annotated[str, typer.Argument(help="grpc://host:port (or host:port), or http://host:port.")]
_MODEL = Annotated[str, typer.Argument(help="The model's name, e.g. support-int4.")]
_VERSION = Annotated[str | None, typer.Option("--version", help="A version; by default the one that is live.")]
_MAX_TOKENS = Annotated[int, typer.Option(min=1, help="Most tokens of answer.")]
_TEMPERATURE = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
_TOP_P = Annotated[float, typer.Option(help="Nucleus sampling: the share of probability kept.")]
_SEED = Annotated[int | None, typer.Option(help="Makes a sampled answer repeatable.")]


def generate(
    url: _URL,
    model: _MODEL,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question; '-' reads standard input.")],
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt as it is, without the chat template.")] = False,
    version: _VERSION = None,
    max_tokens: _MAX_TOKENS = 256,
    temperature: _TEMPERATURE = 0.0,
    top_p: _TOP_P = 1.0,
    seed: _SEED = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the answer before this text; may be repeated.")] = None,
) -> None:
    """Ask a served model one question, streaming to the terminal. Only the answer goes to stdout.

    Example: stillhouse generate grpc://localhost:8001 support-int4 --prompt "How do I return a parcel?"
    """
    from stillhouse.client import Client

    question = sys.stdin.read() if prompt == "-" else prompt
    asked: dict[str, Any] = {"prompt": question} if raw else {"messages": [{"role": "user", "content": question}]}
    sampling = _sampling(max_tokens, temperature, top_p, seed) | ({"stop": stop} if stop else {})
    with Client(url) as client:
        _print_stream(client.stream(model, version=version, **asked, **sampling))


def chat(
    url: _URL,
    model: _MODEL,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    version: _VERSION = None,
    max_tokens: _MAX_TOKENS = 256,
    temperature: _TEMPERATURE = 0.0,
    top_p: _TOP_P = 1.0,
    seed: _SEED = None,
) -> None:
    """Talk with a served model; it remembers the turns. An empty line or Ctrl-D ends it, Ctrl-C stops an answer.

    Example: stillhouse chat grpc://localhost:8001 support-int4
    """
    from stillhouse.client import Client

    messages = [{"role": "system", "content": system}] if system else []
    sampling = _sampling(max_tokens, temperature, top_p, seed)
    with Client(url) as client:
        while question := _ask():
            messages.append({"role": "user", "content": question})
            tokens = client.stream(model, messages=messages, version=version, **sampling)
            try:
                answer = _print_stream(tokens)
            except KeyboardInterrupt:
                tokens.close()
                print(file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    """The next line; the prompt goes to stderr, so that stdout holds the answers alone."""
    try:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip()
    except KeyboardInterrupt:
        return ""


def _sampling(max_tokens: int, temperature: float, top_p: float, seed: int | None) -> dict[str, Any]:
    chosen = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    return chosen | ({"seed": seed} if seed is not None else {})


def _print_stream(tokens: Iterable[Any]) -> str:
    answer = ""
    for token in tokens:
        answer += token.text
        sys.stdout.write(token.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return answer
