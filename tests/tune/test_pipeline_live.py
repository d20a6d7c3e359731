"""The pipeline's last stage on a real Triton: what it built goes live there, and so does what it builds next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from stillhouse.client import Client
from stillhouse.serve.launcher import running_server

pytestmark = [pytest.mark.slow, pytest.mark.triton, pytest.mark.timeout(900)]

NAME = "tiny-fp16"


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, dataset: Path) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(
        f'name = "tiny"\nbase = "{tiny_base}"\nprecisions = ["fp16"]\n[tune]\ndata = "{dataset}"\nepochs = 2\n'
        'batch_size = 4\nlearning_rate = 5e-3\nr = 4\nalpha = 8\ndevice = "cpu"\n[pipeline]\npromote = "grpc://127.0.0.1:9"\n',
        "utf-8",
    )
    return file


def pipeline(recipe: Path) -> tuple[int, dict[str, str], str]:
    """Its exit code, what became of each stage, and its last two lines on stderr."""
    home = recipe.parent
    command = [sys.executable, "-m", "stillhouse.cli.main", "pipeline", str(recipe), "--output", str(home / "runs")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(home / "cache")}
    command += ["--repository", str(home / "repository")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    record = json.loads((home / "runs" / "tiny" / "stages.json").read_text("utf-8"))
    ends = {each["stage"]: each["status"] for each in record["last_run"]}
    return done.returncode, ends, "\n".join(done.stderr.splitlines()[-2:])


def test_what_was_built_goes_live_on_a_running_triton_without_a_failed_request(recipe: Path, tmp_path: Path) -> None:
    code, ends, said = pipeline(recipe)
    promote = f"promote-{NAME}"
    assert (code, ends["precisions"], ends[promote]) == (1, "done", "failed"), said
    assert said.startswith(f"error: {promote}: ") and "127.0.0.1:9" in said and "hint: " in said

    with running_server(tmp_path / "repository", log_file=tmp_path / "triton.log") as server:
        recipe.write_text(recipe.read_text("utf-8").replace("grpc://127.0.0.1:9", server.grpc_url), "utf-8")
        code, ends, said = pipeline(recipe)
        assert code == 0, said
        assert ends.pop(promote) == "done" and set(ends.values()) == {"unchanged"}
        assert answering(server.grpc_url) == ["1"]

        over, failed, answered = threading.Event(), [], []

        def ask() -> None:
            try:
                with Client(server.grpc_url) as client:
                    while not over.is_set():
                        answered.append(client.generate(NAME, "What is six?", max_tokens=4))
            except Exception as error:  # of whatever kind
                failed.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        recipe.write_text(recipe.read_text("utf-8").replace("epochs = 2", "epochs = 1"), "utf-8")
        code, ends, said = pipeline(recipe)
        over.set()
        asking.join()
        assert (code, ends[promote]) == (0, "done"), said
        assert answered and not failed
        assert answering(server.grpc_url) == ["2"]
        assert set(pipeline(recipe)[1].values()) == {"unchanged"}


def answering(url: str) -> list[Any]:
    with Client(url) as client:
        return sorted(model.version for model in client.models() if model.ready)
