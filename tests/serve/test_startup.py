"""What counts as an answer of a model that has just been loaded; Triton is stood in for."""

from __future__ import annotations

import io
import json
import threading
import urllib.error
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.client import Overloaded
from stillhouse.serve import startup
from stillhouse.serve.control import TritonControl
from stillhouse.serve.errors import ServerFailed
from stillhouse.serve.under_way import UnderWay


class Ready(io.BytesIO):
    status = 200


def refused(text: str) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("http://here", 500, "", Message(), io.BytesIO(json.dumps({"error": text}).encode()))


@pytest.fixture
def wait_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Waits for a server that is ready, and whose model meets the question with an error."""
    server: Any = SimpleNamespace(
        http_url="http://here", run_directory=tmp_path, models=[SimpleNamespace(name="m-int4", versions=(2,))]
    )

    def wait(error: Exception) -> None:
        def answer(request: Any, **_: object) -> Ready:
            if request == "http://here/v2/health/ready":
                return Ready()
            assert request.full_url == "http://here/v2/models/m-int4/versions/2/generate"
            raise error

        monkeypatch.setattr(startup, "_LOCAL", SimpleNamespace(open=answer))
        startup.wait_until_ready(server, 60, threading.Event())

    return wait


def test_a_model_that_its_clients_fill_up_at_once_answers(
    wait_for: Callable[[Exception], None], tmp_path: Path
) -> None:
    wait_for(refused("queue full: 32 requests are waiting"))
    under_way = UnderWay(tmp_path)
    under_way.add(2)
    wait_for(TimeoutError())


@pytest.mark.parametrize("error", [refused("internal error: no"), TimeoutError("timed out"), ConnectionResetError()])
def test_one_that_does_not_is_named(wait_for: Callable[[Exception], None], tmp_path: Path, error: Exception) -> None:
    under_way = UnderWay(tmp_path)
    under_way.add(1)  # the question itself
    with pytest.raises(ServerFailed, match="m-int4/2 does not answer") as told:
        wait_for(error)
    assert told.value.model == "m-int4"


def test_a_version_whose_queue_is_full_is_no_reason_not_to_promote_it() -> None:
    def generate(*_: object, **__: object) -> None:
        raise Overloaded("m-int4: queue full")

    control = TritonControl("grpc://127.0.0.1:9")
    crowded: Any = SimpleNamespace(generate=generate, close=lambda: None)
    control._client = crowded
    control.ask("m-int4", 2)
    control.close()
