"""Records a second, memory, precision and recall of `stillhouse data prepare`'s checks and deduplication.

    python benchmarks/dedup.py                       # 25,000, 50,000 and 100,000 made records
    python benchmarks/dedup.py --counts 1000 2000    # to try it out

Records are sentences of made-up words, some 500 characters each. A part of them are copies of others: exact ones, and
near ones in which a share of the words is another word. How alike such a pair is, is computed exactly (the Jaccard
similarity of the shingles), so precision and recall are of the definition: pairs at or above the threshold. Each count
runs in a process of its own, whose peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import itertools

from figures import publish, two_columns
from machine import describe
from roster import HERE, ROOT

from stillhouse.tune.data_recipe import DataRecipe, Duplicates, Source
from stillhouse.tune.duplicates import drop_exact, drop_near, groups_of, same_prompts, text_of
from stillhouse.tune.filters import drop_filtered
from stillhouse.tune.intake import take_in
from stillhouse.tune.personal import Masker
from stillhouse.tune.signatures import jaccard, shingles
from stillhouse.tune.store import Store

DOCS, BEGIN, END = ROOT / "docs/tune.md", "<!-- dedup: begin -->", "<!-- dedup: end -->"
EXACT_SHARE, NEAR_SHARE = 0.05, 0.10
SYLLABLES = [first + vowel for first in "bdfghklmnprstvz" for vowel in "aeiou"]
# Shares of words that are replaced in a near copy: similarities from about 0.97 down to about 0.45.
EDITS = (0.01, 0.03, 0.05, 0.08, 0.12, 0.2)


def made_records(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Records with `copy_of` where one is a copy: the number of the record it was made from."""
    dice = random.Random(seed)
    words = ["".join(dice.choices(SYLLABLES, k=dice.randint(1, 4))) for _ in range(20_000)]
    originals: list[dict[str, Any]] = []  # the latest few hundred, so that memory stays small

    def text(length: int) -> str:
        return " ".join(dice.choices(words, k=length)).capitalize() + "."

    for number in range(count):
        kind = dice.random()
        if originals and kind < EXACT_SHARE:
            original = dice.choice(originals)
            yield {**original, "copy_of": original["number"], "number": number}
        elif originals and kind < EXACT_SHARE + NEAR_SHARE:
            original = dice.choice(originals)
            share = dice.choice(EDITS)
            edited = {name: _edited(original[name], share, words, dice) for name in ("instruction", "output")}
            yield {**edited, "copy_of": original["number"], "number": number}
        else:
            record = {"instruction": text(dice.randint(8, 20)), "output": text(dice.randint(40, 90)), "number": number}
            originals.append(record)
            if len(originals) > 500:
                originals.pop(dice.randrange(len(originals)))
            yield record


def _edited(text: str, share: float, words: list[str], dice: random.Random) -> str:
    return " ".join(dice.choice(words) if dice.random() < share else word for word in text.split())


def run_one(file: Path, folder: Path) -> dict[str, Any]:
    """Reads, checks, filters and deduplicates `file`; seconds by step, peak memory, recall, precision."""
    options = Duplicates()
    recipe = DataRecipe(name="made", sources=[Source(path=str(file), keep=["copy_of", "number"])])
    at = [time.monotonic()]
    with Store(folder, folder / "removed.jsonl") as store:
        take_in(recipe, store, folder / "rejects.jsonl", Masker([]))
        drop_filtered(store, recipe.filters)
        at.append(time.monotonic())
        drop_exact(store)
        at.append(time.monotonic())
        pairs = drop_near(store, options, folder)
        at.append(time.monotonic())
        groups_of(len(store), [*pairs, *same_prompts(store, options, folder)])
        at.append(time.monotonic())
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        store.flush()
        return {
            "records": len(store),
            "seconds": dict(zip(("checks", "exact", "near", "groups"), _differences(at), strict=True)),
            "peak_rss_bytes": peak_bytes,
            **_against_truth(store, options),
        }


def _differences(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def _against_truth(store: Store, options: Duplicates) -> dict[str, Any]:
    """How many copies at or above the threshold were dropped, and how many records were dropped that are no copies.

    A copy whose original was itself dropped (it was a near copy's) does not count; nor do originals.
    """
    numbers = {store[number]["number"]: number for number in range(len(store))}
    expected = found = dropped = wrong = 0
    by_similarity: dict[str, list[int]] = {}
    for number in range(len(store)):
        record = store[number]
        gone = not store.alive(number)
        dropped += gone
        if "copy_of" not in record:
            wrong += gone
            continue
        original = store[numbers[record["copy_of"]]]
        similarity = jaccard(shingles(text_of(record), options.shingle), shingles(text_of(original), options.shingle))
        band = by_similarity.setdefault(f"{min(int(similarity * 20) / 20, 0.95):.2f}", [0, 0])
        band[0] += 1
        band[1] += gone
        if similarity >= options.near:
            expected += 1
            found += gone
        elif gone:
            wrong += 1
    return {
        "pairs": expected,
        "recall": found / expected if expected else None,
        "precision": (dropped - wrong) / dropped if dropped else None,
        "dropped": dropped,
        "by_similarity": {band: by_similarity[band] for band in sorted(by_similarity)},
    }


def measure(counts: list[int], seed: int) -> dict[str, Any]:
    runs = []
    for count in counts:
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / "made.jsonl"
            with file.open("w", encoding="utf-8") as stream:
                for record in made_records(count, seed):
                    stream.write(json.dumps(record) + "\n")
            command = [sys.executable, __file__, "--one", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append({"file_bytes": file.stat().st_size, **json.loads(done.stdout)})
            total_s = sum(runs[-1]["seconds"].values())
            print(f"{count:,} records: {total_s:.1f} s, {count / total_s:,.0f} records/s", file=sys.stderr)
    measured = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {"measured": measured, "machine": describe(), "threads": 1, "seed": seed, "runs": runs}


def markdown(report: dict[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    for run in report["runs"]:
        total_s = sum(run["seconds"].values())
        steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in run["seconds"].items())
        rows.append(
            (
                f"{run['records']:,} records, {run['file_bytes'] / 1e6:.0f} MB",
                f"{run['records'] / total_s:,.0f} records/s; {total_s:.1f} s ({steps}); "
                f"peak {run['peak_rss_bytes'] / 1e6:.0f} MB",
            )
        )
    last = report["runs"][-1]
    rows.append((f"recall of {last['pairs']:,} known pairs at 0.8 or more", f"{last['recall']:.4f}"))
    rows.append((f"precision of {last['dropped']:,} dropped", f"{last['precision']:.4f}"))
    return two_columns(rows, report, f"seed {report['seed']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[25_000, 50_000, 100_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", type=Path, help="run one file in this process and print its figures")
    parser.add_argument("--out", type=Path, default=HERE / "results/dedup.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/tune.md")
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run_one(args.one, Path(folder))))
        return
    report = measure(args.counts, args.seed)
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)


if __name__ == "__main__":
    main()
