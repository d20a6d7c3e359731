"""The arguments of calls in a conversation reach each kind of template as it was written for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import byte_level

from stillhouse.engine.errors import InvalidRequest
from stillhouse.engine.text import Tokenizer

LOOP = (
    "{% for m in messages %}{% for call in m.tool_calls or [] %}{% set f = call.function %}{BODY}{% endfor %}"
    "{% endfor %}"
)
AS_JSON = "{{ f.name }} {{ f.arguments | tojson }}"
JOINED = "{{ f.name + ' ' + f.arguments + '!' }}"
PRINTED = "{% if f.arguments is mapping %}{{ f.name }} {{ f.arguments }} of {{ f.arguments.keys() | join }}{% endif %}"


def conversation(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": arguments}}
    return [{"role": "user", "content": "Find it."}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def tokenizer(directory: Path, body: str) -> Tokenizer:
    byte_level().save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(LOOP.replace("{BODY}", body), "utf-8")
    return Tokenizer(directory)


@pytest.mark.parametrize(
    ("body", "given", "rendered"),
    [
        (AS_JSON, '{"what":"é"}', 'find {"what": "é"}'),
        (AS_JSON, {"what": 5}, 'find {"what": 5}'),
        (AS_JSON, "", "find {}"),
        (AS_JSON, None, "find {}"),
        (JOINED, '{"what":"é"}', 'find {"what":"é"}!'),
        (PRINTED, '{"what":"é"}', 'find {"what":"é"} of what'),
    ],
)
def test_arguments_are_an_object_where_a_template_wants_one_and_a_text_where_it_joins_texts(
    tmp_path: Path, body: str, given: Any, rendered: str
) -> None:
    asked = conversation(given)
    assert tokenizer(tmp_path, body).render_chat(asked) == rendered
    assert asked == conversation(given)


@pytest.mark.parametrize("arguments", ["{what: 5}", "[5]", "5", 5, "[" * 100_000])
def test_arguments_that_are_no_object_are_refused_by_place(tmp_path: Path, arguments: Any) -> None:
    named = r"messages\[1\]\.tool_calls\[0\]\.function\.arguments must be a text with a JSON object, got"
    with pytest.raises(InvalidRequest, match=named):
        tokenizer(tmp_path, AS_JSON).render_chat(conversation(arguments))


@pytest.mark.parametrize("calls", ["find", [5], [{"name": "find"}], [{"function": "find"}]])
def test_calls_of_another_form_are_refused_by_place(tmp_path: Path, calls: Any) -> None:
    asked = [{"role": "assistant", "content": "", "tool_calls": calls}]
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.tool_calls"):
        tokenizer(tmp_path, AS_JSON).render_chat(asked)


@pytest.mark.parametrize("null", [{"content": None}, {}])
def test_an_answer_that_only_calls_may_have_no_content_and_nulls_are_not_there(
    tmp_path: Path, null: dict[str, Any]
) -> None:
    question, answer = conversation("{}")
    whole = tokenizer(tmp_path, AS_JSON)
    del answer["content"]
    assert whole.render_chat([question, answer | null]) == "find {}"
    seen = tokenizer(tmp_path, "{{ m.content is string }} {{ m.refusal is defined }}")
    assert seen.render_chat([question, answer | null | {"refusal": None}]) == "True False"
    with pytest.raises(InvalidRequest, match=r"messages\[1\]\.content must be a string"):
        whole.render_chat([question, {"role": "assistant", "tool_calls": [], **null}])


def test_thoughts_reach_the_template_by_either_name(tmp_path: Path) -> None:
    question, answer = conversation("{}")
    seen = tokenizer(tmp_path, "{{ m.reasoning_content }}")
    for thoughts in ({"reasoning": "so"}, {"reasoning_content": "so"}, {"reasoning": "or", "reasoning_content": "so"}):
        assert seen.render_chat([question, answer | thoughts]) == "so"
