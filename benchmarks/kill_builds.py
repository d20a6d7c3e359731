"""Kills builds of a recipe at random moments: only whole versions stay, none is lost, and the next build succeeds.

    python benchmarks/kill_builds.py examples/support/recipe.toml --kills 100

Every build runs all of its stages again (--force --no-cache), in a repository and a cache of its own that are removed
at the end. A small model is enough: what counts is how often each moment is hit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stillhouse.engine.directory import model_directories, open_version, version_numbers
from stillhouse.engine.policy import live_versions


def kill_builds(recipe: Path, folder: Path, *, kills: int, seed: int = 0, every: int = 10) -> dict[str, int]:
    """Kills `kills` builds in `folder`; after each, and after a whole build every so often, checks what is there.

    Returns how many were killed, ended before their moment, and how many versions there are. Raises AssertionError
    where a version is not whole or lost, a build does not succeed, or something is left over.
    """
    repository, cache = folder / "repository", folder / "cache"
    command = [sys.executable, "-m", "stillhouse.cli.main", "build", str(recipe), "--repository", str(repository)]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    began = time.monotonic()
    _succeed([*command], environment)
    whole_s = time.monotonic() - began
    seen = check(repository)
    chance = random.Random(seed)
    killed = ended = 0
    while killed < kills:
        began = time.monotonic()
        child = subprocess.Popen(
            [*command, "--force", "--no-cache"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            child.wait(chance.uniform(0.0, whole_s))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            killed += 1
        else:  # it was faster than the first one
            ended, whole_s = ended + 1, min(whole_s, time.monotonic() - began)
        there = check(repository)
        _expect(seen <= there, f"lost: {sorted(seen - there)}")
        seen = there
        if (killed + ended) % every == 0 or killed == kills:
            _succeed([*command, "--force"], environment)
            seen = check(repository)
            _expect(not leftovers(repository, cache), f"left over: {leftovers(repository, cache)}")
        print(f"{killed}/{kills}: {len(seen)} versions", file=sys.stderr)
    return {"killed": killed, "ended before": ended, "versions": len(seen)}


def check(repository: Path) -> set[tuple[str, int]]:
    """All versions, each re-hashed; the live ones among them."""
    found = set()
    for model in model_directories(repository):
        numbers = version_numbers(model)
        for number in numbers:
            _expect(open_version(model / str(number), verify=True).manifest.version == number, f"{model}/{number}")
            found.add((model.name, number))
        live = live_versions(model)
        _expect(bool(live) and set(live) <= set(numbers), f"{model}: live {live} of {numbers}")
    return found


def leftovers(repository: Path, cache: Path) -> list[str]:
    """What dead builds left: temporary directories beside the versions, in the stage cache and in the scratch."""
    places = [*model_directories(repository), cache / "stillhouse" / "stages"]
    hidden = [str(path) for place in places for path in place.iterdir() if path.name.startswith((".new-", ".removed-"))]
    return hidden + [str(path) for path in (cache / "stillhouse" / "scratch").iterdir()]


def _succeed(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    _expect(done.returncode == 0, f"a build failed: {done.stderr[-2000:]}")


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stillhouse-kills-") as folder:
        print(kill_builds(args.recipe.resolve(), Path(folder), kills=args.kills, seed=args.seed))


if __name__ == "__main__":
    main()
