"""What is refused before anything is started, in one line with a hint."""

from __future__ import annotations

import math
import os
import re
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.engine.errors import StillhouseError, UsageError, VersionError
from stillhouse.gateway.gateway import Access
from stillhouse.serve import control
from stillhouse.serve.errors import LoadHopeless, PortInUse, ServeError, ServerFailed, TritonNotFound
from stillhouse.serve.launcher import ServeOptions, start_server
from stillhouse.serve.others import load_others, other_models
from stillhouse.serve.ports import Ports, settle_ports
from stillhouse.serve.repository import served_models
from stillhouse.serve.serving import unguarded
from stillhouse.serve.startup import reason_of_failure
from stillhouse.serve.tritonserver import find_libpython, find_tritonserver, lay_out_backends, server_environment

THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def test_a_port_in_use_is_named_with_the_option_that_changes_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        port = somebody.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"port {port} on 127\.0\.0\.1 cannot be used") as refused:
            settle_ports("127.0.0.1", Ports(http=0, grpc=port, metrics=0))
    assert "--grpc-port" in str(refused.value.hint)


def test_zero_asks_for_free_ports_each_its_own() -> None:
    ports = settle_ports("127.0.0.1", Ports(0, 0, 0))
    assert len({ports.http, ports.grpc, ports.metrics}) == 3
    assert min(ports.http, ports.grpc, ports.metrics) > 1024


@pytest.mark.parametrize(
    ("ports", "words"),
    [
        (Ports(8000, 8000, 8002), "--grpc-port and --http-port are both 8000"),
        (Ports(70000, 8001, 8002), "--http-port must be between 0 and 65535, got 70000"),
    ],
)
def test_ports_that_cannot_be_are_refused_by_name(ports: Ports, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        settle_ports("127.0.0.1", ports)
    assert words in str(refused.value)


@pytest.mark.parametrize("grace_s", [math.nan, math.inf, 1e9, -1.0])
def test_a_grace_time_that_is_none_is_refused_by_name(grace_s: float) -> None:
    with pytest.raises(UsageError, match="--grace must be between 0 and 86400 seconds, got"):
        ServeOptions(Path("model_repository"), grace_s=grace_s)


def test_a_host_that_is_not_ours_is_refused_by_name() -> None:
    with pytest.raises(StillhouseError, match=r"192\.0\.2\.1"):
        settle_ports("192.0.2.1", Ports(0, 0, 8002))


@pytest.mark.parametrize(
    ("host", "keys", "port", "warned"),
    [
        ("0.0.0.0", ("k",), 9000, True),
        ("::", ("k",), 9000, True),
        ("127.0.0.1", ("k",), 9000, False),
        ("localhost", ("k",), 9000, False),
        ("0.0.0.0", (), 9000, False),
        ("0.0.0.0", ("k",), None, False),
    ],
)
def test_who_asks_for_keys_is_told_of_ports_that_know_none(
    tmp_path: Path, host: str, keys: tuple[str, ...], port: int | None, warned: bool
) -> None:
    options = ServeOptions(tmp_path, host=host, openai_host="0.0.0.0", openai_port=port, access=Access(keys))
    said = unguarded(options)
    assert (said is not None) == warned
    assert not said or (f"ports on {host}" in said and "--triton-host 127.0.0.1" in said)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_repository_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(VersionError, match=f"{name} is not a model repository") as refused:
        served_models(tmp_path / name)
    assert "--repository" in str(refused.value.hint)


def test_a_version_without_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "support-int4" / "1").mkdir(parents=True)
    (tmp_path / "support-int4" / "config.pbtxt").write_text('backend: "stillhouse"\n')
    with pytest.raises(VersionError, match=re.escape(f"{tmp_path / 'support-int4' / '1'} is not a version directory")):
        served_models(tmp_path)


def test_a_model_without_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "support-int4" / "1").mkdir(parents=True)
    with pytest.raises(VersionError, match=r"support-int4 has no config\.pbtxt"):
        served_models(tmp_path)


def test_a_model_that_is_not_there_is_named_beside_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "support-int4" / "1").mkdir(parents=True)
    with pytest.raises(UsageError, match="no model 'support-int3'") as refused:
        served_models(tmp_path, ["support-int3"])
    assert "support-int4" in str(refused.value.hint)


ENSEMBLE = 'name: "whole"\nplatform: "ensemble"  # backend: "stillhouse"\nmax_batch_size: 0\n'


def add_model(repository: Path, name: str, config: str) -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(config)


def test_a_model_of_another_backend_is_left_to_triton(support_repository: Path, tmp_path: Path) -> None:
    (tmp_path / "support-int4").symlink_to(support_repository / "support-int4")
    add_model(tmp_path, "whole", ENSEMBLE)
    add_model(tmp_path, "after", "backend:'python'\n")
    assert [str(model) for model in served_models(tmp_path)] == ["support-int4/1"]
    assert other_models(tmp_path) == ["after", "whole"]
    assert [model.name for model in served_models(tmp_path, ["whole", "support-int4"])] == ["support-int4"]
    assert other_models(tmp_path, ["whole", "support-int4"]) == ["whole"]
    assert other_models(tmp_path, ["support-int4"]) == []


def test_models_of_other_backends_alone_are_refused_by_name(tmp_path: Path) -> None:
    add_model(tmp_path, "whole", ENSEMBLE)
    for names in (None, ["whole"]):
        with pytest.raises(UsageError, match=r"whole of .* of other backends"):
            served_models(tmp_path, names)


def test_a_model_of_another_backend_that_cannot_be_loaded_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded: list[str] = []

    class Control:
        def __init__(self, url: str) -> None:
            assert url == "grpc://here:1"

        def load(self, model: str, hopeless: Callable[[], str | None]) -> None:
            if model == "after":
                raise ServeError("no module named pandas")
            if (reason := hopeless()) is not None:
                raise LoadHopeless(reason)
            loaded.append(model)

        def close(self) -> None:
            pass

    monkeypatch.setattr(control, "TritonControl", Control)
    load_others("grpc://here:1", ["after", "dead", "whole"], {"dead": "its process died"}.get)
    assert loaded == ["whole"]
    assert "after, of another backend, is left out: no module named pandas" in caplog.text
    assert "dead, of another backend, is left out: its process died" in caplog.text


def test_a_missing_libpython_names_the_package_to_install(tmp_path: Path) -> None:
    with pytest.raises(TritonNotFound, match=rf"libpython{re.escape(THIS_PYTHON)}\.so\.1\.0") as refused:
        find_libpython([tmp_path])
    assert f"apt install libpython{THIS_PYTHON}" in str(refused.value.hint)


def test_a_tritonserver_that_is_no_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(TritonNotFound, match=re.escape(f"{tmp_path / 'tritonserver'} is not an executable file")):
        find_tritonserver(tmp_path / "tritonserver")


def nvidia_layout(home: Path, python: str) -> Path:
    """The files of an installation as in NVIDIA's container, with a stub that embeds `python`."""
    binary, backend = home / "bin" / "tritonserver", home / "backends" / "python"
    binary.parent.mkdir(parents=True)
    backend.mkdir(parents=True)
    binary.write_bytes(b"")
    binary.chmod(stat.S_IRWXU)
    (backend / "libtriton_python.so").write_bytes(b"library")
    (backend / "triton_python_backend_utils.py").write_text("")
    (backend / "triton_python_backend_stub").write_bytes(b"\0libpython" + python.encode() + b".so.1.0\0")
    return binary


def test_a_stub_of_another_python_is_refused_with_both_versions(tmp_path: Path) -> None:
    with pytest.raises(TritonNotFound, match=rf"embeds Python 3\.99, this is Python {re.escape(THIS_PYTHON)}"):
        find_tritonserver(nvidia_layout(tmp_path, "3.99"))


def test_a_server_without_python_backend_names_the_missing_part(tmp_path: Path) -> None:
    binary = nvidia_layout(tmp_path, THIS_PYTHON)
    (tmp_path / "backends" / "python" / "libtriton_python.so").unlink()
    with pytest.raises(TritonNotFound, match=r"libtriton_python\.so is missing"):
        find_tritonserver(binary)


def test_the_backend_directory_copies_the_library_and_links_the_stub(tmp_path: Path) -> None:
    install = find_tritonserver(nvidia_layout(tmp_path / "triton", THIS_PYTHON))
    backends = lay_out_backends(install, tmp_path / "backends")
    assert not (backends / "python" / "libtriton_python.so").is_symlink()
    assert (backends / "python" / "triton_python_backend_stub").resolve() == install.stub.resolve()
    assert "class TritonPythonModel" in (backends / "stillhouse" / "model.py").read_text()


def test_the_servers_environment_puts_this_python_first(tmp_path: Path) -> None:
    environment = server_environment(tmp_path, '{"max_num_seqs": 4}', tmp_path / "drain")
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["LD_LIBRARY_PATH"].split(os.pathsep)[0] == str(tmp_path)
    assert environment["STILLHOUSE_ENGINE_OPTIONS"] == '{"max_num_seqs": 4}'


def test_the_servers_environment_holds_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_API_KEY", "sesame")
    environment = server_environment(tmp_path, "{}", tmp_path / "drain")
    assert not [name for name, value in environment.items() if "sesame" in value]
    assert os.environ["STILLHOUSE_API_KEY"] == "sesame", "a repair starts another server, not another gateway"


@pytest.mark.parametrize(
    ("engine", "words"),
    [({"max_num_seqs": 0}, "engine option max_num_seqs"), ({"max_sequences": 4}, "unknown engine option")],
)
def test_an_engine_option_that_cannot_be_is_refused_before_the_start(
    support_repository: Path, engine: dict[str, int | None], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        start_server(ServeOptions(support_repository, ports=Ports(0, 0, 0), engine=engine))


def test_the_backends_own_report_is_the_reason_of_a_failure(tmp_path: Path) -> None:
    log = tmp_path / "triton.log"
    log.write_text(
        'E1124 23:35:42.4 6532 server.cc:241] "CudaDriverHelper has not been initialized."\n'
        'stillhouse-load-error {"model": "m-int4", "version": 2, "message": "model.onnx differs", "hint": "build"}\n'
        'E1124 23:35:43.4 6532 model_lifecycle.cc:642] "failed to load"\n'
    )
    failure = reason_of_failure(log, 1)
    assert isinstance(failure, ServerFailed)
    assert str(failure) == "m-int4/2 cannot be loaded: model.onnx differs"
    assert failure.hint == "build"


def test_without_a_report_the_reason_is_tritons_first_error_that_matters(tmp_path: Path) -> None:
    log = tmp_path / "triton.log"
    log.write_text(
        'E1124 23:35:42.4 6532 server.cc:241] "CudaDriverHelper has not been initialized."\n'
        'E1124 23:35:43.4 6532 main.cc:1] "failed to start HTTP service"\nerror: creating server\n'
    )
    assert str(reason_of_failure(log, 1)) == "the Triton server ended with status 1: failed to start HTTP service"
