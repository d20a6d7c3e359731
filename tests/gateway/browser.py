"""A headless chromium, driven over its DevTools protocol: https://chromedevtools.github.io/devtools-protocol/."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Page:
    """One page: go somewhere, run JavaScript in it, wait until something holds."""

    def __init__(self, url: str) -> None:
        self._socket = websocket.create_connection(url, timeout=60, suppress_origin=True)
        self._number = 0
        self.requested: list[str] = []
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A DevTools command and its result; what the page requests and complains of is noted on the way."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script: str, timeout_s: float = 30.0) -> Any:
        """Waits until the expression is truthy, and returns its value."""
        begun = time.monotonic()
        while not (value := self.run(script)):
            assert time.monotonic() - begun < timeout_s, f"{script} did not come to hold; {self.complaints}"
            time.sleep(0.05)
        return value

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message["method"] == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif message["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif message["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(params["entry"]["text"])


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A fresh browser's first page. Skips the test where there is none."""
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.skip("no chromium on PATH (Debian, Ubuntu: apt install chromium)")
    # As root, which CI often is, chromium refuses to start with its sandbox.
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [binary, *words, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    with (profile.parent / "chromium.log").open("w+") as log:
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            yield Page(_page_url(profile.parent / "chromium.log"))
        finally:
            browser.terminate()
            browser.wait(20)


def _page_url(log: Path) -> str:
    begun = time.monotonic()
    while not (found := re.search(r"DevTools listening on ws://([^/]+)/", log.read_text("utf-8"))):
        assert time.monotonic() - begun < 60, log.read_text("utf-8")
        time.sleep(0.1)
    with urllib.request.urlopen(f"http://{found[1]}/json/list", timeout=20) as response:
        pages = [target for target in json.load(response) if target["type"] == "page"]
    return str(pages[0]["webSocketDebuggerUrl"])
