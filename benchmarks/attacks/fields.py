"""What can be wrong in the fields of a request, at every door."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from attacks import values
from attacks.attack import Attack, Maker, asked, posted, told, triton
from attacks.values import Expected, Value, dumped

_FIELDS: dict[str, Callable[[Random], Value]] = {
    "numbers out of range": values.out_of_range,
    "wrong types": values.wrong_type,
    "unknown fields": values.unknown_field,
    "grammars": values.grammar,
}


def makers_of(door: str) -> dict[str, Maker]:
    """The makers by kind."""
    if door == "gateway":
        return {
            **{kind: _gateway_fields(make) for kind, make in _FIELDS.items()},
            "control tokens in text": _gateway_text,
            "prompts of megabytes": _gateway_huge,
            "deep JSON": _gateway_deep,
            "broken UTF-8": _gateway_utf8,
            "broken JSON": _gateway_json,
            "messages of a wrong form": _gateway_messages,
            "wrong shapes": _gateway_shapes,
        }
    makers = {
        **{kind: _triton_fields(make) for kind, make in _FIELDS.items()},
        "control tokens in text": _triton_text,
        "prompts of megabytes": _triton_huge,
        "deep JSON": _triton_deep,
        "broken UTF-8": _triton_utf8,
        "broken JSON": _triton_json,
        "messages of a wrong form": _triton_messages,
    }
    return {kind: _at(door, make) for kind, make in makers.items()}


# OpenAI's API


def _gateway_fields(make: Callable[[Random], Value]) -> Maker:
    def attack(random: Random, model: str) -> Attack:
        (path, body), value = asked(random, model), make(random)
        return posted(path, body | value.fields, told(value.fields), value.expected)

    return attack


def _gateway_text(random: Random, model: str) -> Attack:
    text = values.hostile_text(random)
    if random.random() < 0.2:
        return posted("/tokenize", {"model": model, "prompt": text}, told(text), "answer")
    path, body = asked(random, model, text)
    return posted(path, body, told(text), "answer")


def _gateway_huge(random: Random, model: str) -> Attack:
    which = random.randrange(len(values.HUGE) + 4)
    if which < len(values.HUGE):
        path, body = asked(random, model, values.HUGE[which]())
        return posted(path, body, f"text {which}", "refusal")
    large: tuple[tuple[str, dict[str, Any]], ...] = (
        ("/v1/completions", {"prompt": [1] * 2_500_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}] * 200_000}),
        ("/v1/completions", {"prompt": "x" * 17_000_000}),
        ("/v1/completions", {"prompt": ["x"] * 1_000_000}),
    )
    path, fields = large[which - len(values.HUGE)]
    return posted(path, {"model": model, **fields}, f"{path} {next(iter(fields))} {which}", "refusal")


def _gateway_deep(random: Random, model: str) -> Attack:
    deep = values.deep_json(random)
    path, body = asked(random, model)
    name = random.choice(("", "temperature", "messages", "prompt", "metadata", "response_format", "logit_bias", "stop"))
    about = f"{name} of {len(deep)} bytes, {deep[:8]}"
    if not name:
        return posted(path, deep.encode(), about, "refusal")
    expected: Expected = "either" if name == "metadata" else "refusal"
    return posted(path, (dumped(body)[:-1] + f', "{name}": {deep}}}').encode(), about, expected)


def _gateway_utf8(random: Random, model: str) -> Attack:
    bad = random.choice((*values.BROKEN_UTF8, b"\\ud800"))
    path, body = asked(random, model, "MARK")
    return posted(path, dumped(body).encode().replace(b"MARK", bad), told(bad), "refusal")


def _gateway_json(random: Random, model: str) -> Attack:
    bad = random.choice(values.BROKEN_JSON)
    return posted(asked(random, model)[0], bad, told(bad[:40]), "refusal")


def _gateway_messages(random: Random, model: str) -> Attack:
    wrong = random.random() < 0.6
    messages = random.choice(values.MESSAGES if wrong else values.ODD_MESSAGES)
    expected: Expected = "refusal" if wrong else "either"
    if random.random() < 0.3:
        return posted("/tokenize", {"model": model, "messages": messages}, told(messages), expected)
    body = {"model": model, "messages": messages, "max_tokens": 1}
    return posted("/v1/chat/completions", body, told(messages), expected)


def _gateway_shapes(random: Random, model: str) -> Attack:
    tokens = ([-1], [10**9], ["a"], [[1]], 5, {}, None, [0.5], [True])
    if random.random() < 0.15:
        chosen = random.choice(tokens)
        return posted("/detokenize", {"model": model, "tokens": chosen}, told(chosen), "refusal")
    prompts = ([], [[]], [""], [[1], []], [1, "a"], [["a"]], [[[1]]], [-1], [10**9], 5, {}, [None], "")
    forms = (5, {}, {"type": "x"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {}})
    changes: tuple[dict[str, Any], ...] = (
        *({"prompt": prompt} for prompt in prompts),
        *({"model": name} for name in (None, 5, "", "nobody", "x" * 10_000, "../../etc/passwd", "\x00")),
        *({"logprobs": count} for count in (-1, 21, "x", [])),
        *({"response_format": form} for form in forms),
        *({"best_of": 0}, {"suffix": "x"}, {"echo": "yes"}, {"stream": "yes"}, {"stream_options": {"a": 1}}),
    )
    change = random.choice(changes)
    body = {"model": model, "prompt": "Hi", "max_tokens": 1} | change
    return posted("/v1/completions", body, told(change), "refusal")


# Triton's

TritonMaker = Callable[[str, Random, str], Attack]


def _at(door: str, make: TritonMaker) -> Maker:
    return lambda random, model: make(door, random, model)


def _triton_fields(make: Callable[[Random], Value]) -> TritonMaker:
    def attack(door: str, random: Random, model: str) -> Attack:
        value, stream = make(random), random.random() < 0.5
        parameters = dumped({"max_tokens": random.randint(1, 3)} | value.fields)
        return triton(door, model, {"text_input": "Hi"}, parameters, told(value.fields), value.expected, stream=stream)

    return attack


def _triton_text(door: str, random: Random, model: str) -> Attack:
    text, stream = values.hostile_text(random), random.random() < 0.5
    return triton(door, model, {"text_input": text}, '{"max_tokens": 2}', told(text), "answer", stream=stream)


def _triton_huge(door: str, random: Random, model: str) -> Attack:
    which = random.randrange(len(values.HUGE) + 3)
    parameters, prompt = '{"max_tokens": 1}', dict[str, Any]()
    if which < len(values.HUGE):
        prompt["text_input"] = values.HUGE[which]()
    elif which == len(values.HUGE):
        prompt["input_ids"] = [1] * 1_000_000
    elif which == len(values.HUGE) + 1:
        prompt["messages"] = dumped([{"role": "user", "content": "x"}] * 200_000)
    else:
        prompt["text_input"], parameters = "Hi", dumped({"stop": "x" * 10_000_000, "max_tokens": 1})
    expected: Expected = "either" if prompt.get("text_input") == "Hi" else "refusal"
    return triton(door, model, prompt, parameters, f"huge {which}", expected)


def _triton_deep(door: str, random: Random, model: str) -> Attack:
    deep, stream = values.deep_json(random), random.random() < 0.5
    name = random.choice(("parameters", "temperature", "stop", "json", "messages", "outside"))
    about = f"{name} of {len(deep)} bytes, {deep[:8]}"
    if name == "messages":
        return triton(door, model, {"messages": deep}, "{}", about, "refusal", stream=stream)
    if name == "outside" and door == "http":
        return posted(f"/v2/models/{model}/generate", f'{{"text_input": "a", "x": {deep}}}'.encode(), about, "refusal")
    if name == "json":  # a schema may hold keywords that nobody knows, also one in another
        parameters = f'{{"max_tokens": 2, "structured_outputs": {{"json": {deep}}}}}'
        return triton(door, model, {"text_input": "Hi"}, parameters, about, "either", stream=stream)
    parameters = f'{{"{name}": {deep}}}' if name in ("temperature", "stop") else deep
    return triton(door, model, {"text_input": "Hi"}, parameters, about, "refusal", stream=stream)


def _triton_utf8(door: str, random: Random, model: str) -> Attack:
    bad = random.choice((*values.BROKEN_UTF8, b"\\ud800"))
    where = random.choice(("text_input", "messages", "parameters", *(("outside",) if door == "http" else ())))
    if where == "outside":
        body = b'{"text_input": "Hi", ' + random.choice((b'"temperature": "' + bad + b'"}', b'"' + bad + b'": 1}'))
        return posted(f"/v2/models/{model}/generate", body, told(body), "refusal")
    prompt: dict[str, Any] = {"text_input": b"Hi " + bad if where == "text_input" else "Hi"}
    if where == "messages":
        prompt = {"messages": b'[{"role": "user", "content": "' + bad + b'"}]'}
    parameters = b'{"stop": "' + bad + b'"}' if where == "parameters" else b'{"max_tokens": 1}'
    # In a text the escape of half a surrogate pair is six characters, and a stop string of it never comes.
    expected: Expected = "either" if bad.startswith(b"\\") else "refusal"
    return triton(door, model, prompt, parameters, f"{where} {bad!r}", expected)


def _triton_json(door: str, random: Random, model: str) -> Attack:
    bad = random.choice([text for text in values.BROKEN_JSON if text.strip()])
    return triton(door, model, {"text_input": "Hi"}, bad, told(bad[:40]), "refusal")


def _triton_messages(door: str, random: Random, model: str) -> Attack:
    wrong = random.random() < 0.6
    messages = random.choice(values.MESSAGES if wrong else values.ODD_MESSAGES)
    expected: Expected = "refusal" if wrong else "either"
    return triton(door, model, {"messages": dumped(messages)}, '{"max_tokens": 1}', told(messages), expected)
