"""Kills `stillhouse edge pull` (SIGKILL) at random moments and looks each time whether the device would still serve.

    python benchmarks/kill_pulls.py model_repository/support-int4 --kills 50

Serves a copy of the model's live version, as a newer one, from a static HTTP server that knows no ranges. Every other
kill falls anywhere in a pull; the others fall at the switch: between the end of the asking (the smoke test) and a
little after the new version is live. After each the live version is opened with every file hashed, and has to answer
(see --ask-every). Needs the disk of four.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import os
import random
import select
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

# So much later than the switch a kill may fall that is meant for it.
AFTER_THE_SWITCH = 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model's directory")
    parser.add_argument("--kills", type=int, default=50)
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
    device, seen, answered = first.parent, Counter[str](), 0
    handler = functools.partial(Quiet, directory=str(folder / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/{model.name}"
        command = [sys.executable, "-m", "stillhouse.cli.main", "edge", "pull", url, "--repository", str(device.parent)]
        asked_s, switch_s = undisturbed(command, device)
        print(f"undisturbed: asked after {asked_s:.2f} s, live {switch_s * 1000:.1f} ms later", flush=True)
        for kill in range(options.kills):
            at_the_switch = kill % 2 == 1
            moment_s = choose.uniform(0, AFTER_THE_SWITCH * switch_s if at_the_switch else asked_s + switch_s)
            state = killed_at(command, moment_s, at_the_switch)
            there = (device / "2").is_dir()
            (live,) = live_versions(device)
            open_version(device / str(live))
            if kill % options.ask_every == options.ask_every - 1:
                check_answers(device / str(live))
                answered += 1
            where = "at the switch" if at_the_switch else "anywhere"
            seen[
                f"{where}, {state}: version 2 {'live' if live == 2 else 'there, not live' if there else 'not there'}"
            ] += 1
            staged = sum(file.stat().st_size for file in device.glob(".pull-*/*"))
            print(f"kill {kill + 1:3d} {where}, {moment_s:.4f} s: {state}; version {live} live, {staged} bytes wait")
            if there:
                begin_again(device)
        subprocess.run(command, check=True)
        server.shutdown()
    found = {"kills": options.kills, "a whole version live after": options.kills, "which answered": answered}
    print(json.dumps(found | {"seen": dict(sorted(seen.items())), "live at the end": live_versions(device)}, indent=2))


def undisturbed(command: list[str], device: Path) -> tuple[float, float]:
    """Seconds of a pull until its version has been asked, and from then until that is live."""
    begun_s = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert until_asked(process)
        asked_s = time.monotonic()
        while live_versions(device) != [2]:
            time.sleep(0.0002)
        live_s = time.monotonic()
    begin_again(device)
    return asked_s - begun_s, live_s - asked_s


def killed_at(command: list[str], moment_s: float, at_the_switch: bool) -> str:
    """Kills a pull `moment_s` after its start or, at the switch, after the asking; what the kill found."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if at_the_switch:
        assert until_asked(process)
    time.sleep(moment_s)
    state = "ended before" if process.poll() is not None else "killed"
    process.kill()
    process.wait()
    return state


def until_asked(pull: subprocess.Popen[bytes]) -> bool:
    """Waits until the pull's own child, which asks the version, has ended; False where the pull ends without one."""
    children = Path(f"/proc/{pull.pid}/task/{pull.pid}/children")
    while pull.poll() is None:
        if child := children.read_text().split():
            # Readable at the moment at which the process ends; the pull hears of it no earlier.
            descriptor = os.pidfd_open(int(child[0]))
            select.select([descriptor], [], [])
            os.close(descriptor)
            return True
        time.sleep(0.002)
    return False


def begin_again(device: Path) -> None:
    """Version 1 is live again, and version 2 is not there."""
    set_live_versions(device, [1])
    shutil.rmtree(device / "2")


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
