"""A picture of the load test's report for the README: a real run against the demo's model, as chromium shows it.

python benchmarks/report_picture.py                       # drives support-int4 for a minute; docs/loadtest-report.png
python benchmarks/report_picture.py --report monday.html  # of a report that is there
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

from roster import ROOT
from served import served

from stillhouse.loadtest.load import Load
from stillhouse.loadtest.run import run_locust
from stillhouse.loadtest.save import save_run

STAGE_S, LEVELS = 12, (0.5, 1, 1.5, 2, 2.5)  # seconds; requests a second
WIDTH, HEIGHT = 1040, 1240  # as far as the last plot; the settings below it are for searching, not for looking at
COLOURS = 48
MOST_BYTES = 200_000


def drive(model: Path, name: Path) -> Path:
    """The report of a load that rises in steps."""
    stages = "".join(f"[[stage]]\nduration_s = {STAGE_S}\nlevel = {level}\n" for level in LEVELS)
    toml = name.with_suffix(".toml")
    toml.write_text(f'unit = "rate"\n{stages}', "utf-8")
    slo = "ttft_p95<200ms, itl_p95<50ms"
    load = Load(stages=str(toml), duration_s=STAGE_S * len(LEVELS), max_tokens=48, slo=slo)
    with served(model) as server:
        warm_up = Load(users=1, duration_s=3)
        run_locust(server.grpc_url, server.model, warm_up, metrics_url=server.metrics_url)
        result = run_locust(server.grpc_url, server.model, load, metrics_url=server.metrics_url)
    save_run(name, result)
    return name.with_name(f"{name.name}.html")


def photograph(report: Path, picture: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("error: no chromium on PATH (Debian, Ubuntu: apt install chromium)")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        words = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        words += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}", report.resolve().as_uri()]
        subprocess.run([browser, *words], check=True, capture_output=True, timeout=120)
        Image.open(shot).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(picture, optimize=True)
    if picture.stat().st_size > MOST_BYTES:
        raise SystemExit(
            f"error: {picture} has {picture.stat().st_size:,} bytes, at most {MOST_BYTES:,} are for a README"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "model_repository/support-int4")
    parser.add_argument("--report", type=Path, help="show this one, and drive nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/loadtest-report.png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photograph(args.report or drive(args.model, Path(folder) / "report"), args.out)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
