"""The model of the small server: what it answers to a prompt, and what it remembers of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields, replace
from typing import Any

MODELS = {"support-fp16": ["1"], "support-int4": ["1", "2"]}
TOKEN_BYTES = 6


@dataclass(frozen=True)
class Plan:
    """What one request gets: `tokens` words, the first after `first_s`, the others `gap_s` apart."""

    tokens: int = 5
    first_s: float = 0.02
    gap_s: float = 0.01
    end_s: float = 0.0  # from the last token to the stream's end
    stall_after: int = -1  # after so many tokens: neither error nor end
    break_after: int = -1  # after so many tokens: the connection is gone
    end_after: int = -1  # after so many tokens: a clean end, but no finish reason
    error_after: int = -1  # after so many tokens: the model's error
    garbage_after: int = -1  # after so many tokens: something that is not of the protocol (HTTP only)
    error: str = "the model said no"
    think: int = 0  # so many of the tokens are thoughts
    echo: bool = False  # the first word is the JSON of the inputs that came


class ModelError(Exception):
    """An error that the model answers with."""


class CutShort(Exception):
    """The answer ends here, in good form, but without its last response."""


class Broken(Exception):
    """The connection must be cut."""


class Garbage(Exception):
    """What follows is not of the protocol."""


class Server:
    def __init__(self, default: Plan, slots: int, *, takes_messages: bool = True, counts: bool = True) -> None:
        self.default = default
        self.takes_messages = takes_messages  # Triton's own vLLM backend does not
        self.counts = counts  # Triton's first vLLM backend did not, and had no finish_reason
        self.slots = asyncio.Semaphore(slots)
        self.log: list[dict[str, Any]] = []
        self.stalled_until_s = 0.0  # of the loop's clock: until then no token leaves

    def plan(self, inputs: dict[str, Any]) -> Plan:
        prompt = inputs.get("text_input", "")
        if "messages" in inputs:
            prompt = json.loads(inputs["messages"])[-1]["content"]
        limit = json.loads(inputs.get("sampling_parameters") or "{}").get("max_tokens")
        try:
            wish = json.loads(prompt)
        except json.JSONDecodeError:
            wish = None
        if not isinstance(wish, dict):
            # A plain prompt obeys max_tokens, as a real model does.
            return replace(self.default, tokens=min(self.default.tokens, limit or self.default.tokens))
        return replace(self.default, **{f.name: wish[f.name] for f in fields(Plan) if f.name in wish})

    def check(self, model: str, version: str) -> None:
        if model not in MODELS:
            raise ModelError(f"Request for unknown model: '{model}' is not found")
        if version and version not in MODELS[model]:
            raise ModelError(f"Request for unknown model: '{model}' version {version} is not found")

    async def answer(self, model: str, inputs: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The outputs of one response after another, as the vLLM backend names them; waits for a slot first."""
        for name in inputs:
            if name not in self.input_names():
                raise ModelError(f"unexpected inference input '{name}' for model '{model}'")
        async with self.slots:
            async for outputs in self.answer_now(model, inputs):
                yield outputs if self.counts else {"text_output": outputs["text_output"]}
        if not self.counts and inputs.get("stream"):
            yield {"text_output": ""}

    async def answer_now(self, model: str, inputs: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        plan = self.plan(inputs)
        entry: dict[str, Any] = {"model": model, "inputs": inputs, "sent": 0, "ended": "cancelled"}
        self.log.append(entry)
        loop = asyncio.get_running_loop()
        came = loop.time()
        entry["came_s"] = came
        due = came + plan.first_s
        text = ""
        for index in range(plan.tokens + 1):
            if index == plan.stall_after:
                await asyncio.sleep(3600)
            if index == plan.break_after:
                raise Broken
            if index == plan.garbage_after:
                raise Garbage
            if index == plan.error_after:
                entry["ended"] = "error"
                raise ModelError(plan.error)
            if index == plan.end_after:
                entry["ended"] = "cut short"
                raise CutShort
            if index == plan.tokens:
                break
            while (waits_s := max(due, self.stalled_until_s) - loop.time()) > 0:
                await asyncio.sleep(waits_s)
            due += plan.gap_s
            last = index == plan.tokens - 1
            word = json.dumps(inputs) if plan.echo and index == 0 else f"word{index % 10} "
            if index == plan.think - 1:
                word += "</think> "
            text += word
            entry["sent"] += 1
            entry["last_s"] = loop.time() - came
            entry.setdefault("first_s", entry["last_s"])
            if inputs.get("stream"):
                yield self.outputs(word, index, 1, last)
        if not inputs.get("stream"):
            yield self.outputs(text, plan.tokens - 1, plan.tokens, True)
        await asyncio.sleep(plan.end_s)
        entry["ended"] = "done"

    def input_names(self) -> list[str]:
        names = ["text_input", "stream", "sampling_parameters", "exclude_input_in_output"]
        names += ["messages", "input_ids", "return_details"] if self.takes_messages else []
        counts = ("finish_reason", "cumulative_logprob", "num_input_tokens", "num_output_tokens")
        return names + ([f"return_{name}" for name in counts] if self.counts else [])

    def outputs(self, text: str, index: int, new_tokens: int, last: bool) -> dict[str, Any]:
        return {
            "text_output": text,
            "finish_reason": "stop" if last else "None",
            "cumulative_logprob": -0.5 * (index + 1),
            "num_input_tokens": 7,
            "num_output_tokens": new_tokens,
        }
