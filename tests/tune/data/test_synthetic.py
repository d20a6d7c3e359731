"""Synthetic records: from our own server, from one that fails, and from a journal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from stillhouse.edge.serving import open_engines
from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.engine.options import EngineOptions
from stillhouse.gateway.gateway import Access
from stillhouse.gateway.server import GatewayServer
from stillhouse.tune.data_recipe import DataRecipe, Source, Synthetic
from stillhouse.tune.endpoint import Endpoint
from stillhouse.tune.journal import Journal
from stillhouse.tune.made_up import SCHEMA, texts_of
from stillhouse.tune.personal import Masker
from stillhouse.tune.store import Store
from stillhouse.tune.synthetic import add_synthetic

MODEL = "support-int4"
CUT = '{"instruction": "Wh'
TEMPLATE = (
    "Write another record like these.{% for one in examples %} {{ one.instruction }}{% endfor %} No. {{ number }}"
)


@pytest.fixture(scope="module")
def server(support_repository: Path) -> Iterator[GatewayServer]:
    gateway = GatewayServer("127.0.0.1", 0, Access(("sesame",)))
    gateway.start()
    try:
        options = EngineOptions(max_num_seqs=4, max_model_len=512)
        gateway.plug(lambda: open_engines([(support_repository / MODEL / "1", options)]))
        yield gateway
    finally:
        gateway.drain(0.0)


@pytest.fixture
def tables(server: GatewayServer, tmp_path: Path, made: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe's tables: 20 records, and 3 that our own server makes up."""
    monkeypatch.setenv("STILLHOUSE_KEY", "sesame")
    tools.write(tmp_path / "data.jsonl", [{**row, "label": "own"} for row in made(20)])
    return (
        '[[sources]]\npath = "data.jsonl"\n[duplicates]\nexact = false\nnear = 1\n'
        f'[synthetic]\nurl = "{server.url}/v1"\nmodel = "{MODEL}"\nper_label = 3\nparallel = 2\nmax_tokens = 120\n'
        f"prompts = ['{TEMPLATE}']\napi_key_env = \"STILLHOUSE_KEY\"\ninput_price = 1.0\noutput_price = 2.0\n"
    )


@pytest.mark.slow
def test_our_own_server_makes_records_that_are_marked_and_only_in_train(tables: str, run: Any, tools: Any) -> None:
    done = run(tables)
    card = done.card["synthetic"]
    assert card["asked"] == 3
    assert card["prompt_tokens"] > 0 and card["completion_tokens"] > 0
    assert card["cost"] == pytest.approx((card["prompt_tokens"] + 2 * card["completion_tokens"]) / 1e6, abs=1e-6)
    marked = [record for record in tools.records(done) if "synthetic" in record]
    assert len(marked) == card["kept"] == 3 - card["unusable"]
    assert all(record["synthetic"]["model"] == MODEL and record["label"] == "own" for record in marked)
    assert all("Write another record" in record["synthetic"]["prompt"] for record in marked)
    for name in ("validation", "test"):
        assert not any("synthetic" in record for record in tools.read(done.path / f"{name}.jsonl"))
    again = run(tables, force=True)
    assert again.card["synthetic"]["from_journal"] == 3
    assert again.card["splits"] == done.card["splits"]


def test_what_our_own_server_says_outside_of_the_schema_is_asked_for_again_and_counted(tables: str, run: Any) -> None:
    done = run(f"{tables}json_schema = false\nmax_tokens = 8\n".replace("max_tokens = 120\n", ""))
    card = done.card["synthetic"]
    assert (card["asked"], card["asked_again"], card["unusable"], card["kept"]) == (3, 6, 3, 0)
    assert 9 <= card["completion_tokens"] <= 9 * 8
    assert "6 answers were outside of the schema and asked for again" in (done.path / "README.md").read_text("utf-8")


def _recipe(**options: Any) -> DataRecipe:
    asked = {"url": "http://there/v1", "model": "m", "prompts": ["Make record {{ number }}."], "count": 6} | options
    return DataRecipe(name="made", sources=[Source(path="data.jsonl")], synthetic=Synthetic(**asked))


class Peer:
    """Answers like an OpenAI API, after the faults that it was given."""

    def __init__(
        self, *faults: httpx.Response | Exception, content: str | None = None, contents: Sequence[str] = ()
    ) -> None:
        self.faults, self.content, self.contents = list(faults), content, list(contents)
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        if self.faults:
            fault = self.faults.pop(0)
            if isinstance(fault, Exception):
                raise fault
            return fault
        text = body["messages"][-1]["content"].partition("\n")[0]
        record = {"instruction": f"Q: {text}", "input": "", "output": "Ask ann@example.org."}
        content = json.dumps(record) if self.content is None else self.content
        content = self.contents.pop(0) if self.contents else content
        choice = {"message": {"content": content}, "finish_reason": "length" if content == CUT else "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 5}
        return httpx.Response(200, json={"choices": [choice], "usage": usage})


def _add(recipe: DataRecipe, folder: Path, peer: Peer, masks: tuple[str, ...] = ()) -> tuple[dict[str, Any], list[Any]]:
    assert recipe.synthetic is not None
    endpoint = Endpoint(recipe.synthetic, httpx.MockTransport(peer))
    folder.mkdir(exist_ok=True)
    with Store(folder, folder / "removed.jsonl") as store:
        figures = add_synthetic(recipe, store, Masker(masks), folder, endpoint)
        return figures, [record for _, record in store.living()]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillhouse.tune.endpoint._FIRST_PAUSE_S", 0.0)


def test_the_request_holds_the_answer_to_the_schema_and_the_answer_is_masked_and_counted(tmp_path: Path) -> None:
    peer = Peer()
    figures, records = _add(_recipe(system="Be brief."), tmp_path / "a", peer, ("email",))
    assert peer.bodies[0]["response_format"]["json_schema"]["schema"] == SCHEMA
    assert json.dumps(SCHEMA) in peer.bodies[0]["messages"][-1]["content"]
    assert peer.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert sorted(record["instruction"] for record in records) == [f"Q: Make record {at}." for at in range(6)]
    assert {record["output"] for record in records} == {"Ask [EMAIL]."}
    assert (figures["prompt_tokens"], figures["completion_tokens"]) == (60, 30)


def test_what_can_pass_is_tried_again(tmp_path: Path) -> None:
    busy = httpx.Response(429, headers={"retry-after": "0"}, json={"error": {"message": "slow down"}})
    peer = Peer(busy, httpx.ConnectError("refused"), httpx.Response(500), httpx.ReadTimeout("late"))
    figures, records = _add(_recipe(parallel=1), tmp_path / "a", peer)
    assert len(records) == figures["asked"] == 6
    assert len(peer.bodies) == 10


def test_a_refusal_is_one_line_and_is_not_tried_again(tmp_path: Path) -> None:
    peer = Peer(httpx.Response(401, json={"error": {"message": "no such key"}}))
    with pytest.raises(StillhouseError, match="refuses the request: status 401: no such key"):
        _add(_recipe(parallel=1), tmp_path / "a", peer)
    assert len(peer.bodies) == 1


def test_after_a_failure_only_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    class Failing(Peer):
        def __call__(self, request: httpx.Request) -> httpx.Response:
            return super().__call__(request) if len(self.bodies) < 4 else httpx.Response(503)

    with pytest.raises(StillhouseError, match=r"no answer from .* in 2 tries"):
        _add(_recipe(parallel=1, attempts=2), tmp_path / "a", Failing())
    with (tmp_path / "a" / "synthetic.jsonl").open("ab") as stream:
        stream.write(b'{"key": "torn')
    peer = Peer()
    figures, records = _add(_recipe(parallel=1), tmp_path / "a", peer)
    assert (figures["from_journal"], len(peer.bodies), len(records)) == (4, 2, 6)
    assert figures["prompt_tokens"] == 60


@pytest.mark.parametrize(
    "content", ["", "no JSON", '{"instruction": "q"}', '{"instruction": "", "input": "", "output": "a"}']
)
def test_an_answer_that_stays_no_record_is_counted_and_left_out(content: str, tmp_path: Path) -> None:
    peer = Peer(content=content)
    figures, records = _add(_recipe(), tmp_path / "a", peer)
    assert (figures["unusable"], figures["asked_again"], records) == (6, 12, [])
    assert len(peer.bodies) == 18
    assert (figures["prompt_tokens"], figures["completion_tokens"]) == (180, 90)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("Sure! Here it is.", "Invalid JSON: expected value at line 1 column 1"),
        ('["a", "b"]', "Input should be an object"),
        ('{"instruction": "q", "input": ""}', "output: Field required"),
        ('{"instruction": "q", "input": null, "output": "a"}', "input: Input should be a valid string"),
        ('{"instruction": "q", "input": "", "output": "a", "mood": 1}', "mood: Extra inputs are not permitted"),
        ('{"instruction": "q", "input": "", "output": " "}', "output is empty"),
        (r'{"instruction": "\ud800", "input": "", "output": "a"}', "Invalid JSON: "),
        (CUT, "it was cut off after 512 tokens: be shorter"),
    ],
)
def test_a_model_is_told_why_its_answer_is_asked_for_again(answer: str, told: str, tmp_path: Path) -> None:
    peer = Peer(contents=[answer])
    figures, records = _add(_recipe(count=1), tmp_path / "a", peer)
    first, second = (body["messages"][-1]["content"] for body in peer.bodies)
    assert second.startswith(f"{first}\n\nThe answer before this one was of no use: ")
    assert told in second.removeprefix(first)
    assert peer.bodies[0]["seed"] != peer.bodies[1]["seed"]
    assert (figures["asked_again"], figures["unusable"], len(records)) == (1, 0, 1)
    assert records[0]["synthetic"]["prompt"] == "Make record 0."


def test_no_answer_is_asked_for_again_where_the_recipe_says_so(tmp_path: Path) -> None:
    peer = Peer(content="no JSON")
    figures, _ = _add(_recipe(corrections=0), tmp_path / "a", peer)
    assert (figures["asked_again"], figures["unusable"], len(peer.bodies)) == (0, 6, 6)
    figures, records = _add(_recipe(corrections=1), tmp_path / "a", Peer())  # with more, only those are asked again
    assert (figures["from_journal"], figures["asked_again"], figures["unusable"], len(records)) == (0, 6, 0, 6)
    assert figures["prompt_tokens"] == 120
    figures, _ = _add(_recipe(corrections=1), tmp_path / "a", peer := Peer())
    assert (figures["from_journal"], len(peer.bodies)) == (6, 0)


def test_a_server_without_schemas_reads_it_in_the_prompt_alone(tmp_path: Path) -> None:
    peer = Peer()
    _, records = _add(_recipe(count=1, json_schema=False), tmp_path / "a", peer)
    assert "response_format" not in peer.bodies[0]
    assert json.dumps(SCHEMA) in peer.bodies[0]["messages"][-1]["content"]
    assert len(records) == 1
    busy = httpx.Response(400, json={"error": {"message": "unknown field response_format"}})
    with pytest.raises(StillhouseError, match="unknown field response_format") as refused:
        _add(_recipe(count=1), tmp_path / "b", Peer(busy))
    assert "json_schema = false" in str(refused.value.hint)


@pytest.mark.parametrize("around", ["{}", "```json\n{}\n```", "<think>\nA tent {{}}?\n</think>\n\n{}"])
def test_a_thought_and_a_fence_around_the_record_are_passed_over(around: str) -> None:
    texts = {"instruction": "q", "input": "", "output": "```\na\n```"}
    assert texts_of(around.format(json.dumps(texts))) == texts


def test_a_template_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"synthetic\.prompts\[0\]: 'weather' is undefined"):
        _add(_recipe(prompts=["Write about {{ weather }}."]), tmp_path / "a", Peer())
    with pytest.raises(UsageError, match=r"synthetic\.prompts\[0\]"):
        _add(_recipe(prompts=["{{ ''.__class__.__mro__ }}"]), tmp_path / "a", Peer())


def test_the_journal_survives_a_torn_line(tmp_path: Path) -> None:
    from stillhouse.tune.endpoint import Answer

    with Journal(tmp_path / "j") as journal:
        journal.put("a", Answer("text", 1, 2))
    with (tmp_path / "j").open("ab") as stream:
        stream.write(b'{"key": "b", "te')
    with Journal(tmp_path / "j") as journal:
        assert journal.get("b") is None
        journal.put("c", Answer("more", 3, 4))
    with Journal(tmp_path / "j") as journal:
        assert journal.get("a") == Answer("text", 1, 2)
        assert journal.get("c") == Answer("more", 3, 4)
