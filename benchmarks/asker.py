"""A load client in a process of its own: asks the engine alone, Triton over gRPC, or the gateway over HTTP.

    python benchmarks/asker.py engine VERSION_DIRECTORY OPTIONS_JSON
    python benchmarks/asker.py triton HOST:PORT MODEL
    python benchmarks/asker.py gateway http://HOST:PORT/v1 MODEL

One JSON object a line on stdin, one answer a line on stdout:

    {"prompts": [TEXT, …], "tokens": 96, "concurrent": 16}
        -> {"elapsed_s": S, "tokens": N, "cpu_s": S, "ttft_s": [S, …]}

Greedy, to the length asked for; `concurrent` at a time. Over the network it is as light as Python allows, since it
takes the cores from the server: what comes is counted and left unread, but for the end of each answer, which has to
say that it has the length asked for.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bare_grpc

# Asks one prompt for so many tokens; starts the watch as it sends, and stops it at the first of them.
Ask = Callable[[str, int, Callable[[], Callable[[], None]]], Awaitable[None]]


def over_network(ask: Ask) -> Callable[[list[str], int, int], dict[str, Any]]:
    """`concurrent` prompts at a time through `ask`; TTFT from the sending of each."""
    loop = asyncio.get_event_loop_policy().get_event_loop()

    async def load(prompts: list[str], tokens: int, concurrent: int) -> list[float]:
        left, ttft_s = iter(prompts), list[float]()

        async def worker(left: Iterator[str]) -> None:
            for prompt in left:
                await ask(prompt, tokens, partial(stopwatch, ttft_s))

        await asyncio.gather(*(worker(left) for _ in range(concurrent)))
        return ttft_s

    return lambda prompts, tokens, concurrent: timed(
        lambda: loop.run_until_complete(load(prompts, tokens, concurrent)), tokens * len(prompts)
    )


def stopwatch(times_s: list[float]) -> Callable[[], None]:
    """What, once called, adds the time since now."""
    begun_s = time.perf_counter()
    return lambda: times_s.append(time.perf_counter() - begun_s)


def timed(work: Callable[[], list[float]], tokens: int) -> dict[str, Any]:
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    ttft_s = work()
    return {
        "elapsed_s": time.perf_counter() - begun_s,
        "tokens": tokens,
        "cpu_s": time.process_time() - begun_cpu_s,
        "ttft_s": ttft_s,
    }


def triton(address: str, model: str) -> Ask:
    """Triton's streaming gRPC, over bare connections that are kept; responses stay bytes."""
    from stillhouse.client.grpc_wire import write_request
    from stillhouse.client.types import Request

    idle = list[bare_grpc.Connection]()

    async def ask(prompt: str, tokens: int, watch: Callable[[], Callable[[], None]]) -> None:
        sampling = json.dumps({"max_tokens": tokens, "temperature": 0, "ignore_eos": True})
        inputs: dict[str, str | bool | list[int]] = {"text_input": prompt, "sampling_parameters": sampling}
        inputs |= {"stream": True, "return_finish_reason": True}
        message = write_request(Request(model, "", inputs, stream=True)).SerializeToString()
        if idle:
            connection = idle.pop()
        else:
            connection = bare_grpc.Connection(address, "/inference.GRPCInferenceService/ModelStreamInfer")
            await connection.open()
        first, tail = watch(), b""
        async for data in connection.call(message):
            if not tail:
                first()
            tail = (tail + data)[-2048:]
        idle.append(connection)
        # The finish reason as it stands in a raw tensor; an end mark may follow in a response of its own.
        if b"\6\0\0\0length" not in tail:
            raise RuntimeError(f"the answer did not come whole: {tail!r}")

    return ask


def gateway(url: str, model: str) -> Ask:
    """OpenAI's API as a stream of events, over bare HTTP connections that are kept."""
    address, idle = urlsplit(url), list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()

    async def ask(prompt: str, tokens: int, watch: Callable[[], Callable[[], None]]) -> None:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        data = json.dumps(body).encode()
        head = f"POST {address.path}/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        reader, writer = idle.pop() if idle else await asyncio.open_connection(address.hostname, address.port)
        first = watch()
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        tail, begun = b"", False
        while not tail.endswith(b"\r\n0\r\n\r\n"):
            part = await reader.read(65536)
            if not part:
                raise RuntimeError(f"the gateway closed the connection: {tail!r}")
            if not begun and b"data: " in part:
                begun = True
                first()
            tail = (tail + part)[-2048:]
        if f'"completion_tokens":{tokens},'.encode() not in tail:
            raise RuntimeError(f"the answer did not come whole: {tail!r}")
        idle.append((reader, writer))

    return ask


def engine(version: str, options_json: str) -> Callable[[list[str], int, int], dict[str, Any]]:
    """The engine without a text door: token ids in and out. Prompts are turned into ids before the clock runs."""
    from stillhouse.engine.model import LanguageModel
    from stillhouse.engine.options import EngineOptions
    from stillhouse.engine.request import Token
    from stillhouse.engine.sampling import SamplingParams

    model = LanguageModel.load(Path(version), EngineOptions.model_validate_json(options_json), verify=False)

    def load(prompts: Sequence[list[int]], tokens: int, concurrent: int) -> list[float]:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        left, ttft_s, ended = iter(prompts), list[float](), queue.SimpleQueue[Token]()

        def ask_next() -> None:
            if (prompt := next(left, None)) is None:
                return
            first = [stopwatch(ttft_s)]

            def take(token: Token) -> None:
                if first:
                    first.pop()()
                if token.finish_reason is not None:
                    ended.put(token)

            model.engine.submit(prompt, params, take)

        for _ in range(concurrent):
            ask_next()
        for _ in prompts:
            if (token := ended.get()).finish_reason != "length":
                raise token.error or RuntimeError(f"the answer ended with {token.finish_reason}")
            ask_next()
        return ttft_s

    def run(prompts: list[str], tokens: int, concurrent: int) -> dict[str, Any]:
        ids = [model.prompt_ids(text=prompt) for prompt in prompts]
        return timed(lambda: load(ids, tokens, concurrent), tokens * len(ids))

    return run


def main(way: str, *arguments: str) -> None:
    ways = {"triton": lambda *to: over_network(triton(*to)), "gateway": lambda *to: over_network(gateway(*to))}
    run = (ways | {"engine": engine})[way](*arguments)
    print("{}", flush=True)  # ready
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
