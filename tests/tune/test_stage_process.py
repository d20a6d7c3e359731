"""A stage as a child process: it ends with the one that runs it, and may put back what it was changing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def test_after_ctrl_c_a_stage_may_put_back_what_it_was_changing(tmp_path: Path, wait_until: Any) -> None:
    stage = (
        "import time\nfrom pathlib import Path\n"
        "try:\n  Path('begun').touch()\n  time.sleep(60)\n"
        "except KeyboardInterrupt:\n  time.sleep(0.5)\n  Path('put back').touch()\n"
    )
    script = (
        "import sys\nfrom pathlib import Path\nfrom stillhouse.tune.stage_process import run_stage\n"
        f"run_stage('promote', [sys.executable, '-c', {stage!r}], Path('.'))\n"
    )
    pipeline = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: (tmp_path / "begun").exists())
        os.killpg(pipeline.pid, signal.SIGINT)  # as a terminal does
        assert pipeline.wait(timeout=30) != 0
    finally:
        pipeline.kill()
    assert (tmp_path / "put back").exists()
