"""A mixed load over a server's three doors: what a client asks, how it goes on, and what has to come of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import openai
from served import Served

from stillhouse.client import AsyncClient, ClientError, RequestRejected

# Kinds of requests by how many of 100 there are.
KINDS = {"short": 30, "long": 10, "sampled": 20, "alike": 15, "given up": 15, "refused": 10}
DOORS = ("grpc", "http", "gateway")
WORDS = ("boots", "order", "parcel", "refund", "invoice", "colour", "size", "address", "winter", "letter", "voucher")
ALIKE = "You help the customers of a shop. " + "Be polite and short, and never promise what is not in the rules. " * 12
LONGER_THAN_THE_CONTEXT = "one two three " * 3000


@dataclass
class Seen:
    """How many requests of each door and kind ended as they should, and what became of the others."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Errand:
    """One request; `gives_up_after` tokens its client goes away."""

    kind: str
    door: str
    prompt: str
    streamed: bool
    sampling: dict[str, Any]
    gives_up_after: int | None = None


class Doors:
    """Connections to a server's doors; a context manager."""

    def __init__(self, server: Served) -> None:
        self.model = server.model
        self.grpc, self.http = AsyncClient(server.grpc_url), AsyncClient(server.http_url)
        self.gateway = openai.AsyncOpenAI(base_url=server.openai_url, api_key="none", max_retries=0, timeout=300)

    async def answers(self, question: str) -> list[str]:
        """A greedy answer of 48 tokens from each door, the same prompt at all of them."""
        sampling: dict[str, Any] = {"max_tokens": 48, "temperature": 0}
        asked = [
            client.generate(self.model, question, **sampling, ignore_eos=True) for client in (self.grpc, self.http)
        ]
        plain = [(await one).text for one in asked]
        create = self.gateway.completions.create
        whole = await create(model=self.model, prompt=question, **sampling, extra_body={"ignore_eos": True})
        return [*plain, whole.choices[0].text]

    async def __aenter__(self) -> Doors:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(self.grpc.close(), self.http.close(), self.gateway.close())


def errand(chance: random.Random) -> Errand:
    """The next request, by chance."""
    kind, door = chance.choices(list(KINDS), list(KINDS.values()))[0], chance.choice(DOORS)
    prompt = " ".join(chance.choices(WORDS, k=chance.randint(5, 60)))
    sampling: dict[str, Any] = {"max_tokens": chance.randint(4, 24), "temperature": 0}
    gives_up_after = None
    if kind == "long":
        sampling |= {"max_tokens": chance.randint(100, 300)}
        prompt = " ".join(chance.choices(WORDS, k=chance.randint(100, 300)))
    elif kind == "sampled":
        sampling |= {"temperature": 0.9, "top_p": 0.9, "seed": chance.randrange(10**6), "stop": ["zebra"]}
    elif kind == "alike":
        prompt = ALIKE + prompt
    elif kind == "given up":
        sampling |= {"max_tokens": 1000}
        gives_up_after = chance.randint(1, 20)
    elif kind == "refused":
        sampling, prompt = chance.choice(
            [
                ({"max_tokens": 0, "temperature": 0}, prompt),
                ({"max_tokens": 8, "temperature": -1}, prompt),
                ({"max_tokens": 8, "temperature": 0}, LONGER_THAN_THE_CONTEXT),
            ]
        )
    streamed = kind == "given up" or chance.random() < 0.7
    return Errand(kind, door, prompt, streamed, sampling, gives_up_after)


async def ask_until(end_s: float, doors: Doors, seen: Seen, seed: str) -> None:
    """One client: errand after errand until `end_s` of time.monotonic."""
    chance = random.Random(seed)
    while time.monotonic() < end_s:
        one = errand(chance)
        try:
            tokens = await (_ask_gateway(doors, one) if one.door == "gateway" else _ask_triton(doors, one))
        except (RequestRejected, openai.BadRequestError) as error:
            outcome = None if one.kind == "refused" else f"{type(error).__name__}: {error}"
        except (ClientError, openai.OpenAIError) as error:
            outcome = f"{type(error).__name__}: {error}"
        else:
            outcome = "answered all the same" if one.kind == "refused" else None if tokens else "no token came"
        if outcome is None:
            seen.counts[f"{one.door}, {one.kind}"] += 1
        else:
            seen.failures.append(f"{one.door}, {one.kind}: {outcome}"[:500])


async def _ask_triton(doors: Doors, one: Errand) -> int:
    """The number of tokens that came."""
    client = doors.grpc if one.door == "grpc" else doors.http
    if not one.streamed:
        return (await client.generate(doors.model, one.prompt, **one.sampling)).num_output_tokens or 0
    tokens = client.stream(doors.model, one.prompt, **one.sampling)
    count = 0
    try:
        async for token in tokens:
            count = token.num_output_tokens or count
            if one.gives_up_after is not None and count >= one.gives_up_after:
                break
    finally:
        await tokens.aclose()
    return count


async def _ask_gateway(doors: Doors, one: Errand) -> int:
    """The number of tokens, or of pieces of text, that came."""
    messages = [{"role": "user", "content": one.prompt}]
    create = doors.gateway.chat.completions.create
    if not one.streamed:
        whole = await create(model=doors.model, messages=messages, **one.sampling)  # type: ignore[call-overload]
        return int(whole.usage.completion_tokens)
    stream = await create(model=doors.model, messages=messages, stream=True, **one.sampling)  # type: ignore[call-overload]
    count = 0
    try:
        async for chunk in stream:
            count += bool(chunk.choices and (chunk.choices[0].delta.content or chunk.choices[0].finish_reason))
            if one.gives_up_after is not None and count >= one.gives_up_after:
                break
    finally:
        await stream.close()
    return count
