"""Kills `stillhouse edge pull` (SIGKILL) at random moments and looks each time whether the device would still serve.

    python benchmarks/kill_pulls.py model_repository/support-int4 --kills 50

Serves a copy of the model's live version, as a newer one, from a static HTTP server that knows no ranges; after each
kill the live version is opened with every file hashed, and has to answer (see --ask-every). Needs the disk of four.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from stillhouse.edge.smoke import check_answers
from stillhouse.engine.directory import open_version
from stillhouse.engine.policy import live_versions, set_live_versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model's directory")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--longest-s", type=float, default=8.0, help="a kill comes between 0 and so many seconds")
    parser.add_argument("--ask-every", type=int, default=1, help="the live version has to answer once in so many kills")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-pulls-") as folder:
        kill_often(options, Path(folder), random.Random(options.seed))


def kill_often(options: argparse.Namespace, folder: Path, choose: random.Random) -> None:
    model: Path = options.model
    newest = live_versions(model)[-1]
    first = place(model / str(newest), folder / "device" / model.name, 1)
    place(model / str(newest), folder / "served" / model.name, 2)
    device, seen = first.parent, Counter[str]()
    handler = functools.partial(Quiet, directory=str(folder / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/{model.name}"
        command = [sys.executable, "-m", "stillhouse.cli.main", "edge", "pull", url, "--repository", str(device.parent)]
        for kill in range(options.kills):
            moment_s = choose.uniform(0.0, options.longest_s)
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(moment_s)
            state = "ended before" if process.poll() is not None else "killed"
            process.kill()
            process.wait()
            (live,) = live_versions(device)
            open_version(device / str(live))
            asked = kill % options.ask_every == options.ask_every - 1
            if asked:
                check_answers(device / str(live))
            seen[f"{state}, version {live} live and whole" + (" and answering" if asked else "")] += 1
            staged = sum(file.stat().st_size for file in device.glob(".pull-*/*"))
            print(
                f"kill {kill + 1:3d} at {moment_s:5.2f} s: {state}; version {live} live, {staged} bytes wait",
                flush=True,
            )
            if live == 2:  # back to the beginning
                set_live_versions(device, [1])
                shutil.rmtree(device / "2")
        subprocess.run(command, check=True)
        server.shutdown()
    print(json.dumps({"kills": options.kills, "seen": seen, "live_at_the_end": live_versions(device)}, indent=2))


def place(version: Path, model: Path, number: int) -> Path:
    """A copy of `version` as another number, live; its large files are hard links where that can be."""
    target = model / str(number)
    target.mkdir(parents=True)
    for file in version.iterdir():
        if file.name != "manifest.json":
            link_or_copy(file, target / file.name)
    manifest = json.loads((version / "manifest.json").read_text("utf-8"))
    (target / "manifest.json").write_text(json.dumps(manifest | {"version": number}), "utf-8")
    (model / "config.pbtxt").write_text('backend: "stillhouse"\n', "utf-8")
    set_live_versions(model, [number])
    return target


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy(source, target)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # whoever asked was killed
            return


if __name__ == "__main__":
    main()
