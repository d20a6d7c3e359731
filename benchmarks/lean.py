"""The lean installation: `.[edge,cpu]` in fresh environments of Python 3.10, 3.11 and 3.12, and what it costs there.

    python benchmarks/lean.py model_repository/support-int4/1 --write-docs

For each interpreter that is found (on PATH, or pyenv's): what pip installs and how large it is, what importing takes,
and `edge generate` from the start of the process to the first token on its standard output, with its peak memory: once
as the first start on this device, which packs the weights, then as any later one (medians).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import publish
from machine import describe
from roster import HERE, ROOT

DOCS, BEGIN, END = ROOT / "docs/edge.md", "<!-- lean: begin -->", "<!-- lean: end -->"
PYTHONS = ("3.10", "3.11", "3.12")
NOT_LEAN = ("torch", "transformers", "tritonclient", "optimum", "onnx", "grpcio", "locust")
PROMPT = "How do I return a parcel?"
_IMPORTS = "import time; t = time.perf_counter(); import stillhouse.edge.loading, stillhouse.engine.runner"


@dataclass(frozen=True)
class Start:
    """One `edge generate`: seconds from the start of the process to its first token, peak memory, and the answer."""

    first_token_s: float
    peak_rss_bytes: int
    answer: str


def interpreters() -> dict[str, Path]:
    """The Pythons among 3.10, 3.11 and 3.12 that are here and start."""
    found = {}
    for version in PYTHONS:
        named = shutil.which(f"python{version}")
        managed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
        for python in [*([Path(named)] if named else []), *managed]:
            # A name on PATH may be a shim of a version manager, which starts nothing.
            if subprocess.run([python, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
                found[version] = python
                break
    return found


def install(python: Path, environment: Path) -> Path:
    """A fresh environment with this checkout's `edge` and `cpu` and nothing else, pip neither; its interpreter."""
    subprocess.run([python, "-m", "venv", "--without-pip", environment], check=True)
    inside = environment / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(inside), "--disable-pip-version-check", "--quiet"]
    subprocess.run([*command, "install", f"{ROOT}[edge,cpu]"], check=True, stdout=sys.stderr, env=clean())
    return inside


def installed(python: Path) -> dict[str, str]:
    """Names and versions of what is installed for an interpreter."""
    code = "import importlib.metadata as m; print(*{f'{d.name}={d.version}' for d in m.distributions()}, sep='\\n')"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=clean())
    return dict(line.lower().split("=", 1) for line in done.stdout.split())


def start(python: Path, version: Path, cache: Path, max_tokens: int = 16) -> Start:
    """Runs `edge generate` with `cache` as the place of what it keeps."""
    command = [python.with_name("stillhouse"), "edge", "generate", version, "--prompt", PROMPT]
    begun_s = time.perf_counter()
    process = subprocess.Popen(
        [*map(str, command), "--max-tokens", str(max_tokens)],
        stdout=subprocess.PIPE,
        env=clean() | {"XDG_CACHE_HOME": str(cache)},
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    first_token_s = time.perf_counter() - begun_s
    answer = (first + process.stdout.read()).decode()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Start(first_token_s, used.ru_maxrss * 1024, answer)


def import_s(python: Path) -> float:
    """Seconds that importing what `edge generate` needs takes, in a process of its own."""
    code = f"{_IMPORTS}; print(time.perf_counter() - t)"
    return float(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=clean()).stdout)


def clean() -> dict[str, str]:
    """The environment without what would lead an interpreter to other packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYENV", "VIRTUAL_"))}


def measure(python: Path, version: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """The figures of one interpreter, in an environment below `folder`."""
    inside = install(python, folder / "environment")
    packages = installed(inside)
    if wrong := [name for name in NOT_LEAN if name in packages]:
        raise SystemExit(f"not lean: {', '.join(wrong)} came along")
    first = start(inside, version, folder / "cache")
    later = [start(inside, version, folder / "cache") for _ in range(rounds)]
    return {
        "onnxruntime": packages["onnxruntime"],
        "packages": len(packages),
        "installed_bytes": sum(file.lstat().st_size for file in (folder / "environment/lib").rglob("*")),
        "import_s": median(import_s(inside) for _ in range(rounds)),
        "first_start": asdict(first),
        "first_token_s": median(each.first_token_s for each in later),
        "peak_rss_bytes": max(each.peak_rss_bytes for each in later),
        "answer": later[0].answer,
    }


def markdown(report: dict[str, Any]) -> str:
    """A column a Python."""
    of = report["pythons"]
    rows = [
        ("ONNX Runtime", [each["onnxruntime"] for each in of.values()]),
        ("packages", [str(each["packages"]) for each in of.values()]),
        ("installed", [f"{each['installed_bytes'] / 1e6:.0f} MB" for each in of.values()]),
        ("import", [f"{each['import_s']:.2f} s" for each in of.values()]),
        ("start to first token", [f"{each['first_token_s']:.2f} s" for each in of.values()]),
        (
            "the same, first start on a device",
            [f"{each['first_start']['first_token_s']:.2f} s" for each in of.values()],
        ),
        ("peak RSS", [f"{each['peak_rss_bytes'] / 1e6:.0f} MB" for each in of.values()]),
        ("the same, first start", [f"{each['first_start']['peak_rss_bytes'] / 1e6:.0f} MB" for each in of.values()]),
    ]
    lines = ["| | " + " | ".join(f"Python {name}" for name in of) + " |", "|---|" + "--:|" * len(of)]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    machine = report["machine"]
    about = f"{machine['processor']}, {machine['cores']} cores; medians of {report['rounds']} starts"
    return "\n".join([*lines, "", f"Machine: {about}. Measured {report['measured']}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", type=Path, nargs="?", default=ROOT / "model_repository/support-int4/1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results/lean.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/edge.md")
    args = parser.parse_args()
    figures = {}
    for name, python in interpreters().items():
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = measure(python, args.version, Path(folder), args.rounds)
        print(f"Python {name}: done", file=sys.stderr)
    if len({each["answer"] for each in figures.values()}) > 1:
        print("the answers differ: the ONNX Runtimes are not the same", file=sys.stderr)
    report = {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(),
        "rounds": args.rounds,
        "pythons": figures,
    }
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)


if __name__ == "__main__":
    main()
