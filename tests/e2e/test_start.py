"""What a server is started with: versions that are what they were, and the command's options."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.serve.launcher import Server, running_server

pytestmark = pytest.mark.triton


def test_a_tampered_version_is_refused_by_name_at_the_start(
    support_repository: Path, tmp_path: Path, processes_below: Callable[[Path], list[int]], free_ports: list[str]
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(support_repository / "support-int4", repository / "support-int4")
    (version,) = (repository / "support-int4").glob("[0-9]*")
    weights = version / "model.onnx.data"
    with weights.open("r+b") as stream:
        stream.seek(weights.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse.cli.main", "serve", "--repository", str(repository), *free_ports],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "TMPDIR": str(home), "XDG_STATE_HOME": str(home / "state")},
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert done.returncode == 1
    assert "model.onnx.data differs from its manifest" in errors[0]
    assert errors[1].startswith("hint: build the version again")
    assert "Traceback" not in done.stderr
    assert processes_below(home) == []


def test_engine_options_of_the_command_reach_the_engine(support_repository: Path, tmp_path: Path) -> None:
    with running_server(
        support_repository, models=["support-int4"], engine={"max_model_len": 64}, log_file=tmp_path / "triton.log"
    ) as server:
        status, answer = ask_too_long(server)
    assert status == 400
    assert "the context holds 64" in answer["error"]


def ask_too_long(server: Server) -> tuple[int, Any]:
    body = json.dumps({"text_input": "word " * 80}).encode()
    request = urllib.request.Request(f"{server.http_url}/v2/models/support-int4/generate", body)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    return refused.value.code, json.loads(refused.value.read())
