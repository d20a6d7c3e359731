"""The report: one file that holds everything; looked at in a real browser."""

from __future__ import annotations

import base64
import csv
import importlib.util
import json
import random
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest

from stillhouse.loadtest.compare import Compared
from stillhouse.loadtest.diff import read_run
from stillhouse.loadtest.load import Load
from stillhouse.loadtest.page import page
from stillhouse.loadtest.run import LoadResult
from stillhouse.loadtest.samples import Sample
from stillhouse.loadtest.save import save_comparison, save_run
from stillhouse.loadtest.slo import parse_slo
from stillhouse.loadtest.tally import summarize, tally_up
from stillhouse.loadtest.timeline import Step, by_stage, in_flight, tokens_by_second


def a_step(rate: float, ttft_s: float) -> Step:
    samples = [Sample("m", n / rate, n / rate + ttft_s + 0.2, ttft_s, ttft_s + 0.2, 11, True, "ok") for n in range(9)]
    return Step(f"{rate:g}/s", summarize(samples)[0])


STEPS = [a_step(1, 0.12), a_step(2, 0.15), a_step(4, 0.7)]


def a_run(problems: tuple[str, ...] = (), ended_early: str = "") -> LoadResult:
    chance = random.Random(5)
    slo = parse_slo("ttft_p95<300ms, itl_p95<10ms")
    samples = []
    for n in range(200):
        ttft_s = chance.lognormvariate(-2, 0.5)
        outcome = "StreamBroken" if n % 50 == 49 else "ok"
        samples.append(
            Sample("m<1>", n / 10, n / 10 + ttft_s + 0.2, ttft_s, ttft_s + 0.2, 11, True, outcome, ttft_s + 0.06)
        )
    (tally,) = tally_up(samples, slo).values()
    details = {
        "curves": {"m<1>": tally.curves()},
        "client": {"valid": not problems, "problems": list(problems)},
        "ended_early": ended_early,
        "sample_fields": list(Sample.__dataclass_fields__),
        "samples": [list(astuple(sample)) for sample in samples],
    }
    return LoadResult("m<1>", 4, tally.summary(slo), 1_500_000_000, load=Load(rate=10), host="h:1", details=details)


def test_a_run_is_saved_as_json_csv_and_html(tmp_path: Path) -> None:
    save_run(tmp_path / "new" / "v1.2", a_run())
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files == {"v1.2.json", "v1.2.csv", "v1.2.html"}
    value = json.loads((tmp_path / "new" / "v1.2.json").read_text())
    assert value["settings"]["rate"] == 10 and value["environment"]["packages"]["locust"]
    assert value["summary"]["good"] == 0 and len(read_run(tmp_path / "new" / "v1.2.json").samples) == 200
    with (tmp_path / "new" / "v1.2.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["slo_met"] == "False" and row["failures"] == "4"
    text = (tmp_path / "new" / "v1.2.html").read_text("utf-8")
    assert len(text) < 600_000
    assert "m&lt;1&gt;" in text and "m<1>" not in text
    assert not re.search(r'(?:src|href)="(?!#)|url\((?!#)|@import', text), "nothing is fetched"


def test_what_makes_a_run_worthless_stands_at_the_top() -> None:
    text = page(a_run(("its event loop used 99 % of a core",), "the server at h stopped answering 9 s into the test"))
    assert "not valid: the load generator could not keep up; its event loop used 99 % of a core" in text
    assert "Ended before its time: the server at h stopped answering" in text
    assert "not valid" not in page(a_run())
    run = a_run()
    run.details["interrupted"] = True
    assert "Interrupted: the figures are of what came before." in page(run)


def test_a_run_without_samples_still_has_a_page() -> None:
    run = a_run()
    run.details.update(samples=[], curves={})
    assert "<svg" not in page(run)


def test_a_run_of_which_every_request_failed_still_has_a_page() -> None:
    samples = [Sample("m", float(n), n + 1.0, None, None, 0, False, "TimedOut") for n in range(5)]
    (tally,) = tally_up(samples).values()
    details = {"sample_fields": list(Sample.__dataclass_fields__), "samples": [list(astuple(one)) for one in samples]}
    details |= {"curves": {"m": tally.curves()}}
    text = page(LoadResult("m", 1, tally.summary(), None, details=details))
    assert text.count("<svg") == 2 and "TimedOut 5" in text


def test_the_stages_of_a_shape_are_saved_too(tmp_path: Path) -> None:
    toml = tmp_path / "shape.toml"
    toml.write_text(
        "".join(f"[[stage]]\nduration_s = {s}\nlevel = {level}\n" for s, level in ((5, 0), (5, 9), (99, 11)))
    )
    run = a_run()
    run.details["zero_s"] = -5.0  # the first stage asked nothing
    save_run(tmp_path / "run", replace(run, load=Load(stages=str(toml))))
    steps = json.loads((tmp_path / "run.json").read_text())["steps"]
    assert [(step["load"], step["requests"] + step["failures"].get("StreamBroken", 0)) for step in steps] == [
        ("9 /s", 50),
        ("11 /s", 150),
    ]
    with (tmp_path / "run.csv").open(newline="") as file:
        assert [(row["load"], row["requests"]) for row in csv.DictReader(file)] == [
            ("all", "196"),
            ("9 /s", "49"),
            ("11 /s", "147"),
        ]


def test_a_comparison_is_saved_as_json_csv_and_html(tmp_path: Path) -> None:
    compared = [
        Compared(precision, a_run(problems), 10**9) for precision, problems in (("fp16", ()), ("int4", ("late",)))
    ]
    save_comparison(tmp_path / "c", compared)
    assert [one["precision"] for one in json.loads((tmp_path / "c.json").read_text())] == ["fp16", "int4"]
    with (tmp_path / "c.csv").open(newline="") as file:
        assert [(row["precision"], row["size_bytes"]) for row in csv.DictReader(file)] == [
            ("fp16", "1000000000"),
            ("int4", "1000000000"),
        ]
    text = (tmp_path / "c.html").read_text("utf-8")
    assert "INVALID" in text and "× fp16" in text and text.count("<svg") == 1


def test_the_timeline_counts_every_token_once() -> None:
    samples = [
        Sample("m", 10.0, 14.0, 0.5, 4.0, 8, True, "ok"),
        Sample("m", 11.0, 15.0, None, None, 0, True, "TimedOut"),
    ]
    assert tokens_by_second(samples) == [1, 2, 2, 2, 1]
    flight = {round(at_s, 2): (requests, tokens) for at_s, requests, tokens in in_flight(samples, 5)}
    assert [requests for requests, _ in flight.values()] == [1, 2, 2, 2, 1]
    assert flight[0.5][1] == pytest.approx(8)
    from stillhouse.loadtest.arrivals import Stage

    assert [len(part) for part in by_stage(samples, [Stage(0.5, 1, 1), Stage(0.2, 1, 1)], 10.0)] == [1, 1]


_spec = importlib.util.spec_from_file_location(
    "gateway_browser_for_reports", Path(__file__).parent.parent / "gateway" / "browser.py"
)
assert _spec is not None
assert _spec.loader is not None
browser = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(browser)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("report")
    save_run(folder / "run", a_run(), STEPS)
    with browser.chromium(folder / "profile") as tab:
        tab.call("Page.navigate", url=(folder / "run.html").as_uri())
        tab.wait("document.readyState == 'complete' && document.querySelectorAll('svg').length == 4")
        yield tab


@pytest.mark.browser
def test_the_page_shows_its_pictures_and_figures_in_a_browser(opened: Any) -> None:
    assert "m<1>" in opened.run("document.querySelector('h1').textContent")
    sizes = opened.run(
        "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).map(r => [r.width, r.height])"
    )
    assert all(width > 400 and height > 150 for width, height in sizes)
    legend = opened.run("[...document.querySelectorAll('svg text')].map(t => t.textContent).join('|')")
    for words in ("TTFT", "end to end", "percentile", "tokens/s", "tokens in flight", "TTFT p95", "4/s"):
        assert words in legend
    rows = opened.run("[...document.querySelectorAll('#figures tr')].map(r => r.children.length)")
    assert rows == [7] * 5
    assert opened.run("[...document.querySelectorAll('#slo td')].map(c => c.textContent).includes('missed')")
    assert opened.run("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"


@pytest.mark.browser
def test_the_page_fetches_nothing_and_complains_of_nothing(opened: Any) -> None:
    opened.run("1")
    assert all(url.startswith(("file:", "data:", "about:")) for url in opened.requested)
    assert not opened.complaints


@pytest.mark.browser
def test_each_picture_is_drawn_and_not_blank(opened: Any) -> None:
    """From what the browser painted: a picture's area holds more than one colour."""
    for number in range(4):
        box = opened.run(
            f"(r => ({{x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height, scale: 0.25}}))"
            f"(document.querySelectorAll('svg')[{number}].getBoundingClientRect())"
        )
        shot = opened.call("Page.captureScreenshot", format="png", clip=box, captureBeyondViewport=True)
        assert len(set(pixels(base64.b64decode(shot["data"])))) > 20


def pixels(png: bytes) -> list[bytes]:
    """The bytes of a PNG's rows in threes, unfiltered enough to tell a blank picture from one that is not."""
    data, place = b"", 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            data += png[place + 8 : place + 8 + length]
        place += 12 + length
    raw = zlib.decompress(data)
    return [raw[n : n + 3] for n in range(0, len(raw) - 2, 3)]
