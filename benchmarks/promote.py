"""Promotions and rollbacks under a load of short and long streams: how many requests fail, how many streams break.

    python benchmarks/promote.py                  # 20 moves between two versions of support-int4
    python benchmarks/promote.py --moves 4

A copy of the version (links, and a manifest of its own) is version 2. Plain requests without a version go over gRPC as
streams and over HTTP in one piece, while versions go live and back. Prints JSON; exits 1 where a request failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from stillhouse.client import Client, ClientError
from stillhouse.engine.policy import set_live_versions
from stillhouse.serve.launcher import Server, running_server
from stillhouse.serve.promotion import promote, rollback

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Count: one, two,"
SHORT_TOKENS, LONG_TOKENS = 4, 120


def add_version(model: Path, number: int) -> Path:
    """A version with the files of version 1 (links) and a manifest of its own."""
    new = model / str(number)
    shutil.copytree(model / "1", new, copy_function=os.symlink)
    manifest = json.loads((model / "1" / "manifest.json").read_text("utf-8"))
    (new / "manifest.json").unlink()
    (new / "manifest.json").write_text(json.dumps(manifest | {"version": number}), "utf-8")
    return new


def copy_of(model: Path, repository: Path) -> Path:
    """A model of two versions below `repository`, the first one live; its files are links to those of `model`."""
    copy = repository / model.name
    copy.mkdir(parents=True)
    shutil.copytree(model / "1", copy / "1", copy_function=os.symlink)
    for name in ("config.pbtxt", "engine.json"):
        shutil.copy(model / name, copy / name)
    set_live_versions(copy, [1])
    add_version(copy, 2)
    return copy


@dataclass
class Load:
    """Threads that ask without a pause until `end()`; every answer has to come whole."""

    server: Server
    model: str
    answered: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    longest_wait_s: float = 0.0

    def begin(self, *, short: int = 3, long: int = 2, whole: int = 1) -> None:
        kinds = [("short", SHORT_TOKENS)] * short + [("long", LONG_TOKENS)] * long + [("whole", SHORT_TOKENS)] * whole
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=kind) for kind in kinds]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, kind: str, tokens: int) -> None:
        url = self.server.http_url if kind == "whole" else self.server.grpc_url
        with Client(url) as client:
            while not self._over.is_set():
                self._ask_once(client, kind, tokens)

    def _ask_once(self, client: Client, kind: str, tokens: int) -> None:
        asked: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        try:
            if kind == "whole":
                count = client.generate(self.model, PROMPT, **asked).num_output_tokens
            else:
                count = self._stream(client, asked)
        except ClientError as error:
            self.failures.append(f"{kind}: {type(error).__name__}: {error}")
            return
        self.answered[kind] += 1
        if count != tokens:
            self.failures.append(f"{kind}: {count} of {tokens} tokens came")

    def _stream(self, client: Client, asked: dict[str, Any]) -> int | None:
        count, before_s = None, time.perf_counter()
        for token in client.stream(self.model, PROMPT, **asked):
            now_s = time.perf_counter()
            self.longest_wait_s = max(self.longest_wait_s, now_s - before_s)
            count, before_s = token.num_output_tokens, now_s
        return count


def run(server: Server, repository: Path, model: str, moves: int) -> dict[str, Any]:
    """`moves` promotions and rollbacks by turns, under load; what they took and what failed."""
    load, seconds = Load(server, model), []
    load.begin()
    try:
        for move in range(moves):
            time.sleep(0.5)
            begun_s = time.perf_counter()
            if move % 2 == 0:
                promote(repository, model, 2, server.grpc_url, keep_previous=move % 4 == 2)
            else:
                rollback(repository, model, server.grpc_url)
            seconds.append(time.perf_counter() - begun_s)
    finally:
        load.end()
    return {
        "moves": moves,
        "answered": dict(load.answered),
        "failed": len(load.failures),
        "failures": load.failures[:10],
        "move_s_median": round(median(seconds), 2),
        "move_s_max": round(max(seconds), 2),
        "longest_wait_for_a_token_s": round(load.longest_wait_s, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "model_repository" / "support-int4")
    parser.add_argument("--moves", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = copy_of(options.model.resolve(), Path(folder) / "repository")
        with running_server(model.parent, log_file=Path(folder) / "triton.log") as server:
            figures = run(server, model.parent, model.name, options.moves)
    print(json.dumps(figures, indent=2))
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
