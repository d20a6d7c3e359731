"""`stillhouse edge generate`: the answer on stdout, the rest on stderr, and no more loaded than it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# One that the fine-tune has learnt: what else it still knows differs between precisions and processors.
QUESTION = "How many days do I have to return an item to Brindlecove?"


def edge_generate(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stillhouse.cli.main", "edge", "generate", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_answer_alone_goes_to_stdout(support_repository: Path) -> None:
    done = edge_generate(support_repository / "support-int4" / "1", "--prompt", QUESTION, "--stats")
    assert done.returncode == 0, done.stderr
    assert "47 days" in done.stdout
    assert done.stdout.endswith("\n")
    assert "TTFT" in done.stderr


def test_neither_torch_nor_transformers_nor_triton_is_loaded(support_repository: Path) -> None:
    code = (
        "import sys\nfrom stillhouse.cli.main import run\n"
        f"assert run(['edge', 'generate', {str(support_repository / 'support-int4' / '1')!r}, '-p', 'Hi']) == 0\n"
        "print([m for m in ('torch', 'transformers', 'tritonclient', 'onnx', 'optimum', 'grpc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n")


def test_a_raw_prompt_is_continued_and_a_chat_prompt_answered(support_repository: Path) -> None:
    directory = support_repository / "support-int4" / "1"
    raw = edge_generate(directory, "--prompt", "The capital of France is", "--raw", "--max-tokens", "3")
    assert "Paris" in raw.stdout


def test_a_prompt_is_read_from_standard_input(support_repository: Path) -> None:
    command = [sys.executable, "-m", "stillhouse.cli.main", "edge", "generate"]
    command += [str(support_repository / "support-int4" / "1"), "--prompt", "-"]
    done = subprocess.run(command, input=QUESTION, capture_output=True, text=True, timeout=120)
    assert "47 days" in done.stdout


def test_standard_input_that_is_no_utf8_is_refused_in_a_line(support_repository: Path) -> None:
    command = [sys.executable, "-m", "stillhouse.cli.main", "edge", "generate"]
    command += [str(support_repository / "support-int4" / "1"), "--prompt", "-"]
    done = subprocess.run(command, input=b"caf\xe9", capture_output=True, timeout=120)
    assert done.returncode == 2
    assert b"not text that UTF-8 can hold" in done.stderr and b"Traceback" not in done.stderr


def test_a_changed_byte_is_refused_by_name(support_repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "support-int4" / "1"
    copy.mkdir(parents=True)
    for file in (support_repository / "support-int4" / "1").iterdir():
        if file.name == "tokenizer.json":
            (copy / file.name).write_bytes(file.read_bytes().replace(b"a", b"b", 1))
        else:
            (copy / file.name).symlink_to(file)
    done = edge_generate(copy, "--prompt", QUESTION)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "tokenizer.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_value_out_of_range_is_wrong_usage(support_repository: Path) -> None:
    done = edge_generate(support_repository / "support-int4" / "1", "--prompt", "x", "--top-p", "1.5")
    assert done.returncode == 2
    assert "top_p must be" in done.stderr
