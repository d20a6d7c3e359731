"""Versions go live and back on a real Triton: under load, where the new one is broken, over a restart."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stillhouse.client import Client
from stillhouse.engine.errors import TamperedError, UsageError
from stillhouse.engine.policy import live_versions, previous_version
from stillhouse.serve.errors import PromotionFailed, ServeError
from stillhouse.serve.launcher import Server, running_server
from stillhouse.serve.promotion import promote, rollback

pytestmark = pytest.mark.triton

NAME = "support-int4"
NOBODY = "grpc://127.0.0.1:9"


@pytest.fixture(scope="module")
def moves(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("promote")


@pytest.fixture(scope="module")
def model(support_repository: Path, moves: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1 (live) and 2, 3 with a tampered file, and 4 whose hashes are right and whose graph is none."""
    copy: Path = moves.copy_of(support_repository / NAME, tmp_path_factory.mktemp("promote") / "repository")
    for number, text in ((3, "tampered"), (4, "no graph")):
        graph = moves.add_version(copy, number) / "model.onnx"
        graph.unlink()
        graph.write_text(text)
    manifest = json.loads((copy / "4" / "manifest.json").read_text("utf-8"))
    for record in manifest["files"]:
        if record["path"] == "model.onnx":
            record |= {"bytes": len("no graph"), "sha256": hashlib.sha256(b"no graph").hexdigest()}
    (copy / "4" / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return copy


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(model.parent, log_file=tmp_path_factory.mktemp("promote") / "triton.log") as running:
        yield running


def loaded(server: Server) -> list[str]:
    with Client(server.grpc_url) as client:
        return sorted(entry.version for entry in client.models() if entry.ready)


def answering(server: Server, open_stream: Any) -> str:
    """The version that answers a request without one."""
    asked = {"text_input": "Hello", "stream": True, "sampling_parameters": '{"max_tokens": 1}'}
    with open_stream(server, NAME, asked) as opened:
        return str(opened.next().get_response().model_version)


@pytest.mark.slow
def test_nothing_fails_while_versions_go_live_and_back_under_load(
    server: Server, model: Path, moves: ModuleType, wait_until: Callable[..., float]
) -> None:
    figures = moves.run(server, model.parent, NAME, moves=4)
    assert figures["failures"] == []
    assert min(figures["answered"][kind] for kind in ("short", "long", "whole")) > 0
    assert live_versions(model) == [1]
    wait_until(lambda: loaded(server) == ["1"])


def test_a_promoted_version_answers_and_the_one_before_stays_if_asked(
    server: Server, model: Path, open_stream: Any, wait_until: Callable[..., float]
) -> None:
    assert answering(server, open_stream) == "1"
    promoted = promote(model.parent, NAME, 2, server.grpc_url, keep_previous=True)
    assert (promoted.previous, promoted.live, promoted.served) == (1, [1, 2], True)
    assert answering(server, open_stream) == "2"
    assert loaded(server) == ["1", "2"]
    with pytest.raises(UsageError, match="support-int4/2 is live already"):
        promote(model.parent, NAME, 2, server.grpc_url, keep_previous=True)
    with pytest.raises(UsageError, match="requests without a version go to the highest"):
        promote(model.parent, NAME, 1, server.grpc_url, keep_previous=True)
    rollback(model.parent, NAME, server.grpc_url)
    assert answering(server, open_stream) == "1"
    assert live_versions(model) == [1]
    wait_until(lambda: loaded(server) == ["1"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "kind", "words"),
    [(3, TamperedError, r"3/model\.onnx has 8 bytes"), (4, PromotionFailed, "support-int4/4 was not promoted: ")],
)
def test_a_broken_version_is_not_promoted_and_the_old_one_never_stops(
    server: Server, model: Path, open_stream: Any, version: int, kind: type[Exception], words: str
) -> None:
    before = (model / "config.pbtxt").read_text("utf-8")
    asked = {"text_input": "Hello", "stream": True, "sampling_parameters": '{"max_tokens": 120, "ignore_eos": true}'}
    with open_stream(server, NAME, asked, enable_empty_final_response=True) as opened:
        opened.next()
        with pytest.raises(kind, match=words):
            promote(model.parent, NAME, version, server.grpc_url)
        assert answering(server, open_stream) == "1"
        assert len(list(opened.until_final())) == 119
    assert (model / "config.pbtxt").read_text("utf-8") == before
    assert loaded(server) == ["1"]


def test_a_server_of_another_repository_is_told_apart(server: Server, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "other-int4", symlinks=True)
    with pytest.raises(ServeError, match="knows no model other-int4"):
        promote(tmp_path, "other-int4", 2, server.grpc_url)


@pytest.mark.slow
def test_without_a_server_the_policy_is_set_for_the_next_start(model: Path, tmp_path: Path, open_stream: Any) -> None:
    shutil.copytree(model, tmp_path / NAME, symlinks=True)
    assert not promote(tmp_path, NAME, 2, NOBODY).served
    assert (live_versions(tmp_path / NAME), previous_version(tmp_path / NAME)) == ([2], 1)
    with running_server(tmp_path, log_file=tmp_path / "triton.log") as server:
        assert answering(server, open_stream) == "2"
        rollback(tmp_path, NAME, server.grpc_url)
        assert answering(server, open_stream) == "1"
