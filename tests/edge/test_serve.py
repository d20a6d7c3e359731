"""`stillhouse edge serve`: the OpenAI API on the device, without Triton."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx

CODE = (
    "import sys\nfrom stillhouse.cli.main import run\n"
    "code = run(sys.argv[1:])\n"
    "heavy = ('torch', 'transformers', 'tritonclient', 'onnx', 'grpc')\n"
    "print('code', code, [name for name in heavy if name in sys.modules])"
)


def test_it_answers_with_a_key_and_ends_when_told_to(support_repository: Path, tmp_path: Path) -> None:
    directory, keys = support_repository / "support-int4" / "1", tmp_path / "keys"
    keys.write_text("sesame\n", "utf-8")
    command = ["edge", "serve", str(directory), "--port", "0", "--api-key-file", str(keys), "--max-num-seqs", "2"]
    with subprocess.Popen(
        [sys.executable, "-c", CODE, *command, "--verbose"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as served:
        try:
            assert served.stdout is not None
            lines = [next(served.stdout) for _ in range(4)]
            url = next(found[1] for line in lines if (found := re.match(r"openai +(\S+)", line)))
            body = {"model": "support-int4", "prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}
            assert httpx.post(f"{url}/completions", json=body).status_code == 401
            headers = {"Authorization": "Bearer sesame"}
            answer = httpx.post(f"{url}/completions", json=body, headers=headers, timeout=60).json()
            assert "Paris" in answer["choices"][0]["text"]
            served.send_signal(signal.SIGTERM)
            out, said = served.communicate(timeout=60)
        finally:
            served.kill()
    assert out == "code 0 []\n"
    assert "/v1/completions 200" in said
    assert "sesame" not in said


def test_a_directory_that_is_no_version_is_an_error_that_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stillhouse.cli.main", "edge", "serve", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "is not a version directory" in done.stderr
    assert "Traceback" not in done.stderr
