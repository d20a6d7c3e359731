"""Records a second, memory, precision and recall of what `stillhouse data prepare` checks, drops and groups.

    python benchmarks/dedup.py                       # 25,000, 50,000 and 100,000 made records; then templated ones
    python benchmarks/dedup.py --counts 1000 2000 --templated 1000   # to try it out

Records are made up, with what is known of each (made_records.py): bad ones, exact and near copies, leaks of a prompt
that a model would be measured on. How alike a pair is, is computed exactly (the Jaccard similarity of the shingles), so
precision and recall are of the definition: pairs at or above the threshold. Three quarters of a templated record are
the same in all of them; none is a duplicate for that. Each count runs in a process of its own, with a peak memory of
its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import itertools

from figures import publish, two_columns
from machine import describe
from made_records import KEPT, Maker
from roster import HERE, ROOT

from stillhouse.tune.contamination import drop_contaminated
from stillhouse.tune.data_recipe import Contamination, DataRecipe, Source
from stillhouse.tune.duplicates import drop_exact, drop_near
from stillhouse.tune.filters import drop_filtered
from stillhouse.tune.grouping import groups_of
from stillhouse.tune.intake import take_in
from stillhouse.tune.measured import prompts_of, read_measured
from stillhouse.tune.own_texts import own_of
from stillhouse.tune.personal import Masker
from stillhouse.tune.records import text_of
from stillhouse.tune.signatures import jaccard, shingles
from stillhouse.tune.store import Store

DOCS, BEGIN, END = ROOT / "docs/tune.md", "<!-- dedup: begin -->", "<!-- dedup: end -->"
STEPS = ("checks", "exact", "near", "leaks", "groups")
KINDS = {"bad": "bad records", "duplicates": "duplicates at 0.8 or more", "leaks": "leaks"}
_DUPLICATE = ("exact duplicates", "near-duplicates")


def run_one(file: Path, folder: Path) -> dict[str, Any]:
    """Checks, filters, deduplicates and groups `file`; seconds by step, peak memory, recall and precision."""
    against = [Source(path=str(file.with_name("prompts.jsonl")))]
    recipe = DataRecipe(
        name="made",
        sources=[Source(path=str(file), keep=KEPT)],
        contamination=Contamination(against=against),
    )
    removed, rejects = folder / "removed.jsonl", folder / "rejects.jsonl"
    at = [time.monotonic()]
    with Store(folder, removed) as store:
        asked = read_measured(recipe, rejects).asked
        take_in(recipe, store, rejects, Masker([]))
        drop_filtered(store, recipe.filters)
        own = own_of((record for _, record in store.living()), recipe.duplicates, folder)
        at.append(time.monotonic())
        drop_exact(store)
        at.append(time.monotonic())
        texts = drop_near(store, own, recipe.duplicates, folder)
        at.append(time.monotonic())
        drop_contaminated(store, prompts_of(asked, own), own, recipe, folder)
        at.append(time.monotonic())
        groups_of(store, texts, own, recipe.duplicates, folder)
        at.append(time.monotonic())
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        store.flush()
        gone = {entry["record"]["number"]: entry for entry in map(json.loads, removed.open())}
        lines = file.read_bytes().count(b"\n")
        bad = set(json.loads(file.with_name("bad.json").read_text("utf-8")))
        rejected = {entry["line"] - 1 for entry in map(json.loads, rejects.open())}
        return {
            "records": lines,
            "seconds": dict(zip(STEPS, _differences(at), strict=True)),
            "peak_rss_bytes": peak_bytes,
            "bad": _share(rejected, bad, bad),
            "duplicates": _duplicates(store, gone, recipe),
            "leaks": _leaks(store, gone, recipe, [one.record["instruction"] for one in asked]),
        }


def _share(found: set[int], expected: set[int], right: set[int]) -> dict[str, Any]:
    """Recall of those `expected`; precision of all that was `found`, of which those `right` may be."""
    return {
        "expected": len(expected),
        "found": len(found),
        "recall": len(found & expected) / len(expected) if expected else None,
        "precision": len(found & right) / len(found) if found else None,
    }


def _differences(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def _duplicates(store: Store, gone: dict[int, dict[str, Any]], recipe: DataRecipe) -> dict[str, Any]:
    """Copies at or above the threshold that were dropped; by similarity, how many there are, and how many went."""
    numbers = {store[number]["number"]: number for number in range(len(store))}
    found = {number for number, entry in gone.items() if entry["stage"] in _DUPLICATE}
    expected: set[int] = set()
    right = {number for number in found if _is_right(gone[number], store, numbers, recipe)}
    by_similarity: dict[str, list[int]] = {}
    for number in range(len(store)):
        record = store[number]
        if "copy_of" not in record:
            continue
        similarity = _similarity(text_of(record), text_of(store[numbers[record["copy_of"]]]), recipe)
        band = by_similarity.setdefault(f"{min(int(similarity * 20) / 20, 0.95):.2f}", [0, 0])
        band[0] += 1
        band[1] += record["number"] in found
        if similarity >= recipe.duplicates.near:
            expected.add(record["number"])
    return _share(found, expected, right) | {"by_similarity": dict(sorted(by_similarity.items()))}


def _is_right(entry: dict[str, Any], store: Store, numbers: dict[int, int], recipe: DataRecipe) -> bool:
    """Whether a record that was dropped is a copy, and as much alike the one that it is said to be like."""
    other = store[numbers[entry["same_as"]["line"] - 1]]
    alike = _similarity(text_of(entry["record"]), text_of(other), recipe) >= recipe.duplicates.near
    return alike and "copy_of" in entry["record"]


def _leaks(store: Store, gone: dict[int, dict[str, Any]], recipe: DataRecipe, prompts: list[str]) -> dict[str, Any]:
    """Leaks that were dropped; where a word was replaced, those at or above the threshold are expected to be."""
    found = {number for number, entry in gone.items() if entry["stage"] == "contamination"}
    planted, expected = set(), set()
    for number in range(len(store)):
        record = store[number]
        if "leak_of" not in record or gone.get(record["number"], {}).get("stage") in _DUPLICATE:
            continue
        planted.add(record["number"])
        prompt = prompts[record["leak_of"]]
        holds = prompt.casefold() in record["instruction"].casefold()
        if holds or _similarity(prompt, record["instruction"], recipe) >= recipe.contamination.threshold:
            expected.add(record["number"])
    return _share(found, expected, planted)


def _similarity(one: str, other: str, recipe: DataRecipe) -> float:
    return jaccard(shingles(one, recipe.duplicates.shingle), shingles(other, recipe.duplicates.shingle))


def measure(counts: list[int], templated: list[int], seed: int) -> dict[str, Any]:
    runs = []
    for count, form in [*((count, "ordinary") for count in counts), *((count, "templated") for count in templated)]:
        with tempfile.TemporaryDirectory() as temporary:
            file = _write(Maker(seed, templated=form == "templated"), count, Path(temporary))
            command = [sys.executable, __file__, "--one", str(file)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs.append({"form": form, "file_bytes": file.stat().st_size, **json.loads(done.stdout)})
            total_s = sum(runs[-1]["seconds"].values())
            print(f"{count:,} {form} records: {total_s:.1f} s, {count / total_s:,.0f} records/s", file=sys.stderr)
    measured = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {"measured": measured, "machine": describe(), "threads": 1, "seed": seed, "runs": runs}


def _write(maker: Maker, count: int, folder: Path) -> Path:
    """The records, the evaluation's prompts and which lines are bad, in `folder`; the records' file."""
    file = folder / "made.jsonl"
    with file.open("wb") as stream:
        stream.writelines(maker.lines(count))
    prompts = [json.dumps({"prompt": prompt}) for prompt in maker.prompts]
    (folder / "prompts.jsonl").write_text("\n".join(prompts), "utf-8")
    (folder / "bad.json").write_text(json.dumps(maker.bad), "utf-8")
    return file


def markdown(report: dict[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    for run in report["runs"]:
        total_s = sum(run["seconds"].values())
        steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in run["seconds"].items())
        form = "" if run["form"] == "ordinary" else f"{run['form']} "
        rows.append(
            (
                f"{run['records']:,} {form}records, {run['file_bytes'] / 1e6:.0f} MB",
                f"{run['records'] / total_s:,.0f} records/s; {total_s:.1f} s ({steps}); "
                f"peak {run['peak_rss_bytes'] / 1e6:.0f} MB",
            )
        )
    largest = {run["form"]: run for run in report["runs"]}
    for form, run in largest.items():
        for kind, what in KINDS.items():
            found = run[kind]
            said = f"{what} of {run['records']:,} {form} records ({found['expected']:,} planted): recall, precision"
            rows.append((said, f"{found['recall']:.4f}, {found['precision']:.4f}"))
    return two_columns(rows, report, f"seed {report['seed']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="*", default=[25_000, 50_000, 100_000])
    parser.add_argument("--templated", type=int, nargs="*", default=[25_000, 50_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", type=Path, help="run one file in this process and print its figures")
    parser.add_argument("--out", type=Path, default=HERE / "results/dedup.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/tune.md")
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run_one(args.one, Path(folder))))
        return
    report = measure(args.counts, args.templated, args.seed)
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)


if __name__ == "__main__":
    main()
