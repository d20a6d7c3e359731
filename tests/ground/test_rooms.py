"""The rooms stay apart as the design says: read from the source, nothing is imported."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH = {"torch", "transformers", "peft", "optimum"}
# Room: (rooms of ours it may import, other packages it must not import).
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "engine": (set(), TORCH | {"tritonclient", "locust", "onnx"}),
    "build": ({"engine"}, {"tritonclient", "locust"}),
    "gateway": ({"engine"}, TORCH | {"tritonclient", "locust", "onnx", "onnxruntime"}),
    "serve": ({"engine", "client", "gateway"}, TORCH | {"locust"}),
    "edge": ({"engine", "gateway"}, TORCH | {"tritonclient", "locust", "onnx"}),
    "client": (set(), TORCH | {"onnxruntime", "onnx", "locust"}),
    "loadtest": ({"client"}, TORCH | {"onnxruntime", "onnx"}),
    "tune": ({"engine", "build", "client"}, {"tritonclient", "locust", "onnxruntime"}),
    "cli": (
        {"engine", "build", "gateway", "serve", "edge", "client", "loadtest", "tune"},
        TORCH | {"onnxruntime", "onnx", "tritonclient"},
    ),
}


def imports_of(file: Path) -> list[tuple[int, str]]:
    """Line and dotted name of everything that `file` imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative imports hide which room is meant"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_row_allows(room: str) -> None:
    ours, forbidden = ROOMS[room]
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, f"{room}/ holds no code"
    wrong = []
    for file in files:
        for line, name in imports_of(file):
            parts = name.split(".")
            stranger = parts[0] == "stillhouse" and parts[1] not in ours | {room}
            if stranger or parts[0] in forbidden:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_room_is_a_source_root_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    hatch = project["tool"]["hatch"]["build"]
    assert set(hatch["dev-mode-dirs"]) == set(ROOMS)
    assert {Path(package).parts[0] for package in hatch["targets"]["wheel"]["packages"]} == set(ROOMS)
    assert set(project["tool"]["mypy"]["mypy_path"]) == set(ROOMS)


def test_no_init_file_hides_the_other_rooms() -> None:
    """`stillhouse` is a namespace (PEP 420): one stray __init__.py would make every other room vanish."""
    stray = [file for room in ROOMS for file in (ROOT / room).glob("stillhouse/__init__.py")]
    stray += [file for room in ROOMS for file in (ROOT / room).glob("__init__.py")]
    assert not stray


def test_git_does_not_ignore_the_build_room() -> None:
    lines = [line.strip() for line in (ROOT / ".gitignore").read_text("utf-8").splitlines()]
    assert not {"build", "build/", "/build", "/build/"} & set(lines)
