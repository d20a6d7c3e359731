"""What build writes and everyone reads: the manifest, the options, and which version is live."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from pathlib import Path

import pytest

from stillhouse.engine.directory import model_directories, open_version, version_numbers
from stillhouse.engine.errors import TamperedError, UsageError, VersionError
from stillhouse.engine.manifest import BaseRecord, FileRecord, Manifest, MemoryRecord, ModelRecord
from stillhouse.engine.options import read_options
from stillhouse.engine.policy import live_versions, set_live_versions


@pytest.fixture
def version(tmp_path: Path) -> Path:
    directory = tmp_path / "m-int4" / "1"
    directory.mkdir(parents=True)
    content = b"weights" * 1000
    (directory / "model.onnx").write_bytes(content)
    record = FileRecord(path="model.onnx", bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
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
        files=[record],
        network=network,
        memory=MemoryRecord(weights_bytes=len(content), kv_bytes_per_token=64),
    )
    (directory / "manifest.json").write_text(manifest.to_json(), "utf-8")
    return directory


def test_a_whole_version_opens_and_its_manifest_survives_the_round_trip(version: Path) -> None:
    opened = open_version(version)
    assert Manifest.model_validate_json(opened.manifest.to_json()) == opened.manifest
    assert '"schema": 1' in opened.manifest.to_json()


def test_a_changed_byte_is_refused_by_the_name_of_its_file(version: Path) -> None:
    content = bytearray((version / "model.onnx").read_bytes())
    content[500] ^= 1
    (version / "model.onnx").write_bytes(content)
    with pytest.raises(TamperedError, match=r"model\.onnx differs"):
        open_version(version)


def test_a_missing_or_truncated_file_is_refused_by_name(version: Path) -> None:
    (version / "model.onnx").write_bytes(b"short")
    with pytest.raises(TamperedError, match=r"model\.onnx has 5 bytes"):
        open_version(version)
    (version / "model.onnx").unlink()
    with pytest.raises(TamperedError, match=r"model\.onnx is missing"):
        open_version(version)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}'])
def test_a_manifest_that_is_none_is_refused(version: Path, text: str) -> None:
    (version / "manifest.json").write_text(text, "utf-8")
    with pytest.raises(VersionError, match="does not follow schema 1"):
        open_version(version)


def test_a_model_directory_in_place_of_a_version_gets_the_version_as_a_hint(version: Path) -> None:
    with pytest.raises(VersionError) as caught:
        open_version(version.parent)
    assert caught.value.hint is not None
    assert str(version) in caught.value.hint


def test_versions_are_whole_numbers_and_hidden_leftovers_are_none(version: Path) -> None:
    for name in (".2.tmp", "notes", "10"):
        (version.parent / name).mkdir()
    assert version_numbers(version.parent) == [1, 10]
    assert model_directories(version.parents[1]) == [version.parent]
    with pytest.raises(VersionError, match="not a model repository"):
        model_directories(version / "nowhere")


def test_options_are_read_and_overridden_and_a_wrong_one_is_named(version: Path) -> None:
    assert read_options(version.parent).max_num_seqs == 32
    (version.parent / "engine.json").write_text('{"max_num_seqs": 8}', "utf-8")
    assert read_options(version.parent, {"max_model_len": 99, "threads": None}).max_num_seqs == 8
    assert read_options(version.parent, {"max_num_seqs": 2}).max_num_seqs == 2
    with pytest.raises(UsageError, match="max_num_seqs"):
        read_options(version.parent, {"max_num_seqs": 0})
    (version.parent / "engine.json").write_text('{"max_sequences": 8}', "utf-8")
    with pytest.raises(UsageError, match="max_sequences"):
        read_options(version.parent)


@pytest.mark.parametrize(
    ("policy", "live"),
    [
        ("version_policy {\n  specific { versions: [1] }\n}", [1]),
        ("version_policy: { specific: { versions: 1 versions: 2 } }", [1, 2]),
        ("version_policy { latest { num_versions: 2 } }", [2, 3]),
        ("version_policy: { all: {} }", [1, 2, 3]),
        ("# version_policy: { specific: { versions: [1] } }", [3]),
    ],
)
def test_a_policy_in_any_of_tritons_forms_is_read_and_replaced_whole(
    version: Path, policy: str, live: list[int]
) -> None:
    model = version.parent
    for number in (2, 3):
        (model / str(number)).mkdir()
    config = model / "config.pbtxt"
    config.write_text(f'backend: "stillhouse"\n{policy}\nmax_batch_size: 0\n', "utf-8")
    assert live_versions(model) == live
    set_live_versions(model, [2])
    assert live_versions(model) == [2]
    text = config.read_text("utf-8")
    assert text.count("{") == text.count("}")
    assert "max_batch_size: 0" in text


def test_the_live_version_is_the_newest_until_the_policy_names_another(version: Path) -> None:
    model = version.parent
    (model / "2").mkdir()
    config = model / "config.pbtxt"
    config.write_text('backend: "stillhouse"\n', "utf-8")
    assert live_versions(model) == [2]
    set_live_versions(model, [1])
    assert live_versions(model) == [1]
    set_live_versions(model, [2, 1])
    assert live_versions(model) == [1, 2]
    assert config.read_text("utf-8").count("version_policy") == 1
    assert 'backend: "stillhouse"' in config.read_text("utf-8")
    set_live_versions(model, [7])
    with pytest.raises(VersionError, match="version 7"):
        live_versions(model)
