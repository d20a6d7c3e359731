"""Packed weights are a cache: noticed when stale, cut or foreign, made by two at once, done without if need be."""

from __future__ import annotations

import os
import threading
from datetime import datetime, timezone
from pathlib import Path

import pytest

from stillhouse.engine import weights_cache
from stillhouse.engine.directory import VersionDirectory
from stillhouse.engine.manifest import BaseRecord, FileRecord, Manifest, MemoryRecord, ModelRecord
from stillhouse.engine.weights_cache import prepacked_model, remembered


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stillhouse" / "prepacked"


def version(tmp_path: Path, sha256: str = "a" * 64) -> VersionDirectory:
    network = ModelRecord(
        architecture="llama",
        layers=1,
        hidden_size=8,
        heads=1,
        kv_heads=1,
        head_dim=8,
        vocab_size=16,
        context_length=32,
        eos_token_ids=[2],
    )
    manifest = Manifest(
        name="m",
        model="m-int4",
        version=1,
        precision="int4",
        target="cpu",
        created=datetime.now(timezone.utc),
        inputs_sha256="0",
        base=BaseRecord(id="b", sha256="0"),
        recipe={},
        tools={},
        files=[FileRecord(path="model.onnx.data", bytes=1, sha256=sha256)],
        network=network,
        memory=MemoryRecord(weights_bytes=1, kv_bytes_per_token=64),
    )
    return VersionDirectory(tmp_path, manifest)


class Packer:
    """Writes what a packing would, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _model: Path, target: Path) -> None:
        self.calls += 1
        target.write_bytes(b"graph")
        target.with_name(target.name + ".data").write_bytes(b"weights" * 100)


def test_weights_are_packed_once(tmp_path: Path) -> None:
    pack = Packer()
    first = prepacked_model(version(tmp_path), pack, "ort 1")
    assert prepacked_model(version(tmp_path), pack, "ort 1") == first
    assert first.read_bytes() == b"graph"
    assert pack.calls == 1


def test_another_model_runtime_or_processor_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = Packer()
    paths = {prepacked_model(version(tmp_path), pack, "ort 1"), prepacked_model(version(tmp_path), pack, "ort 2")}
    paths.add(prepacked_model(version(tmp_path, "b" * 64), pack, "ort 1"))
    monkeypatch.setattr(weights_cache, "_cpu", lambda: "another")
    paths.add(prepacked_model(version(tmp_path), pack, "ort 1"))
    assert len(paths) == 4
    assert pack.calls == 4


@pytest.mark.parametrize("harm", ["cut", "zeros", "graph", "stamp", "missing", "foreign"])
def test_what_is_not_whole_is_made_anew(tmp_path: Path, harm: str) -> None:
    pack = Packer()
    model = prepacked_model(version(tmp_path), pack, "ort 1")
    data, stamp = model.with_name("model.onnx.data"), model.with_name("stamp.json")
    if harm == "cut":
        data.write_bytes(b"weights")
    elif harm == "zeros":
        data.write_bytes(bytes(700))
    elif harm == "graph":
        model.write_bytes(b"grapf")
    elif harm == "stamp":
        stamp.write_text("{")
    elif harm == "missing":
        data.unlink()
    else:
        stamp.write_text(stamp.read_text().replace('"key": "', '"key": "x'))
    assert prepacked_model(version(tmp_path), pack, "ort 1") == model
    assert pack.calls == 2
    assert data.read_bytes() == b"weights" * 100


def test_what_a_killed_process_left_goes_after_an_hour(tmp_path: Path, cache: Path) -> None:
    old, young = cache / ".0123-dead", cache / ".4567-busy"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    prepacked_model(version(tmp_path), Packer(), "ort 1")
    assert (old.exists(), young.exists()) == (False, True)


def test_two_processes_may_make_it_at_once(tmp_path: Path, cache: Path) -> None:
    barrier = threading.Barrier(4)

    class Together(Packer):
        def __call__(self, model: Path, target: Path) -> None:
            super().__call__(model, target)
            barrier.wait(10)

    found: list[Path] = []
    pack = Together()
    threads = [
        threading.Thread(target=lambda: found.append(prepacked_model(version(tmp_path), pack, "ort 1")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert [entry.name for entry in cache.iterdir()] == [found[0].parent.name]


def test_a_failure_to_pack_is_said_and_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def full(_model: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    assert prepacked_model(version(tmp_path), full, "ort 1") == tmp_path / "model.onnx"
    assert "No space left" in caplog.text
    assert not list((tmp_path / "cache" / "stillhouse" / "prepacked").iterdir())


def test_the_oldest_go_when_there_are_many(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_cache, "KEEP", 2)
    for number in range(4):
        newest = prepacked_model(version(tmp_path), Packer(), f"ort {number}")
    assert len(list(cache.iterdir())) == 2
    assert newest.is_file()


@pytest.mark.parametrize("verdict", [True, False])
def test_what_was_found_of_packed_weights_is_found_once(tmp_path: Path, verdict: bool) -> None:
    asked: list[bool] = []

    def find() -> bool:
        asked.append(verdict)
        return verdict

    model = prepacked_model(version(tmp_path), Packer(), "ort 1")
    assert [remembered(model, "verdict", find) for _ in range(2)] == [verdict] * 2
    assert len(asked) == 1
    model.with_name("verdict").write_bytes(b"")  # cut short
    assert remembered(model, "verdict", find) is verdict
    plain = tmp_path / "model.onnx"
    assert [remembered(plain, "verdict", find) for _ in range(2)] == [verdict] * 2
    assert len(asked) == 4
    assert not (tmp_path / "verdict").exists()
