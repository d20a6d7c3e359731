"""Hub ids, against a hub of our own: what it gives is used, what it refuses is said in a line of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_the_test"


class Hub(BaseHTTPRequestHandler):
    """owner/open is the tiny base, owner/private the same for TOKEN; others are gated, gone, or broken."""

    base: Path

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        owner = next((name for name in ("open", "private", "gated", "broken") if f"owner/{name}/" in f"{path}/"), None)
        if owner == "gated":
            return self._answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        if owner == "broken":
            return self._answer(500, {"error": "out of order"})
        if owner is None or (owner == "private" and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self._answer(401, {"error": "no such"}, {"X-Error-Code": "RepoNotFound"})
        if "nowhere" in path:
            return self._answer(404, {"error": "no such"}, {"X-Error-Code": "RevisionNotFound"})
        files = sorted(file for file in self.base.iterdir() if file.is_file())
        if "/resolve/" in path:
            file = self.base / path.rpartition("/")[2]
            headers = {"ETag": f'"{file.name}-{file.stat().st_size}"', "X-Repo-Commit": COMMIT}
            return self._answer(200, file.read_bytes(), headers)
        if "/tree/" in path:
            rows = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            return self._answer(200, rows)
        return self._answer(
            200, {"id": f"owner/{owner}", "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
        )

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint(tiny_base: Path) -> Iterator[str]:
    handler = type("TinyHub", (Hub,), {"base": tiny_base})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def dry_run(endpoint: str, folder: Path, base: str, *, token: str | None = None, more: str = "") -> Any:
    (folder / "recipe.toml").write_text(f'name = "tiny"\nbase = "{base}"\nprecisions = ["fp16"]\n{more}')
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "stillhouse.cli.main", "build", str(folder / "recipe.toml"), "--dry-run"]
    command += ["--repository", str(folder / "repository")]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


def test_a_base_is_fetched_from_the_hub_that_is_set(endpoint: str, tmp_path: Path) -> None:
    done = dry_run(endpoint, tmp_path, "owner/open")
    assert done.returncode == 0, done.stderr
    assert "tiny-fp16: a new version" in done.stdout


def test_a_private_base_is_fetched_with_the_token_that_is_set(endpoint: str, tmp_path: Path) -> None:
    done = dry_run(endpoint, tmp_path, "owner/private", token=TOKEN)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("base", "more", "code", "words", "hint"),
    [
        ("owner/gated", "", 1, "base: owner/gated is gated", "accept its terms on the hub, then set HF_TOKEN"),
        ("owner/private", "", 2, "is neither a folder nor on the hub", "private ones need HF_TOKEN"),
        ("owner/gone", "", 2, "is neither a folder nor on the hub", "check the spelling"),
        ("owner/open", 'revision = "nowhere"\n', 2, "has no revision 'nowhere'", "commits"),
        ("owner/broken", "", 1, "the hub cannot be reached", "HF_ENDPOINT"),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_line(
    base: str, more: str, code: int, words: str, hint: str, endpoint: str, tmp_path: Path
) -> None:
    done = dry_run(endpoint, tmp_path, base, more=more)
    error, advice = done.stderr.strip().splitlines()
    assert (done.returncode, done.stdout) == (code, "")
    assert error.startswith("error: ") and words in error
    assert advice.startswith("hint: ") and hint in advice


def test_a_hub_that_is_not_there_is_said_in_a_line(tmp_path: Path) -> None:
    done = dry_run("http://127.0.0.1:9", tmp_path, "owner/open")
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
