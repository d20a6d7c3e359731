"""The page at / in a real browser: choose, ask, watch, stop, go on; nothing is fetched from elsewhere."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.gateway.server import GatewayServer

pytestmark = pytest.mark.browser


_spec = importlib.util.spec_from_file_location("gateway_browser", Path(__file__).with_name("browser.py"))
assert _spec is not None
assert _spec.loader is not None
browser = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(browser)
Page = Any


@pytest.fixture(scope="module")
def page(server: GatewayServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser.chromium(tmp_path_factory.mktemp("browser") / "profile") as opened:
        opened.call("Page.navigate", url=server.url)
        opened.wait("document.querySelectorAll('#model option').length == 2")
        yield opened


def ask(page: Page, text: str) -> None:
    page.run(f"question.value = {text!r}; at('ask').requestSubmit(); 1")


def choose(page: Page, model: str) -> None:
    page.run(f"at('fresh').click(); model.value = {model!r}; model.dispatchEvent(new Event('change')); 1")


def last(name: str) -> str:
    return f"[...document.querySelectorAll('.{name}')].at(-1).textContent"


def test_an_answer_streams_in_and_its_figures_stand_below(page: Page) -> None:
    choose(page, "support-int4")
    page.run("temperature.value = '0'; 1")
    watched = "{childList: true, subtree: true, characterData: true}"
    page.run(f"seen = []; new MutationObserver(() => seen.push(talk.textContent.length)).observe(talk, {watched}); 1")
    ask(page, "How many days do I have to return an item to Brindlecove?")  # which the fine-tune knows
    page.wait("!running")
    assert "47 days" in page.run(last("answer"))
    assert page.run("new Set(seen).size") > 3, "it came in pieces"
    figures = page.run(last("figures"))
    assert "TTFT" in figures
    assert "tokens/s" in figures
    assert page.run("messages.length") == 2
    ask(page, "And of Italy?")
    page.wait("!running")
    assert page.run("messages.map(m => m.role).join()") == "user,assistant,user,assistant"


def test_thoughts_are_folded_away(page: Page) -> None:
    choose(page, "thinker-int4")
    ask(page, "Count.")
    page.wait("!!document.querySelector('details:not([hidden])')")
    assert page.run("document.querySelector('details').open") is False
    page.wait(last("thoughts"))
    page.run("running ? running.abort() : 0; 1")
    page.wait("!running")


def test_an_answer_can_be_stopped_and_the_slot_is_free(page: Page, server: GatewayServer) -> None:
    choose(page, "thinker-int4")
    ask(page, "Count.")
    page.wait("!!running && !!document.querySelector('.thoughts').textContent")
    assert page.run("send.textContent") == "Stop"
    page.run("at('ask').requestSubmit(); 1")
    page.wait("!running")
    assert "stopped" in page.run(last("figures"))
    assert page.run("send.textContent") == "Send"
    generator = server.gateway.generator
    assert generator is not None
    begun = time.monotonic()
    while any(figure.value for figure in generator.figures() if figure.name == "num_requests_running"):
        assert time.monotonic() - begun < 2, "the answer goes on"
        time.sleep(0.01)


def test_an_error_is_shown_and_the_question_given_back(page: Page) -> None:
    choose(page, "support-int4")
    ask(page, "word " * 700)
    page.wait("!running && !!document.querySelector('.fault')")
    assert "maximum context length" in page.run(last("fault"))
    assert page.run("question.value.length") > 3000
    assert page.run("messages.length") == 0


def test_a_question_that_failed_while_the_next_was_typed_is_no_part_of_the_conversation(page: Page) -> None:
    choose(page, "support-int4")
    page.run("sent = fetch; fetch = async () => { question.value = 'The next one'; throw new Error('busy'); }; 1")
    ask(page, "The first one")
    page.wait("!running && !!document.querySelector('.fault')")
    page.run("fetch = sent; 1")
    assert page.run("question.value") == "The next one"
    assert page.run("messages.length") == 0


def test_nothing_came_from_elsewhere_and_nothing_complained(page: Page, server: GatewayServer) -> None:
    page.run("1")
    elsewhere = [url for url in page.requested if not url.startswith((server.url, "data:", "about:"))]
    assert not elsewhere
    # The refused question of the test before is logged by the browser itself.
    assert not [words for words in page.complaints if "400 (Bad Request)" not in words]
