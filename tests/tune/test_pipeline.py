"""Stages run where something that they read has changed, go on after a kill, and stop at one that fails."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune import stage_process
from stillhouse.tune.pipeline import Places, plan, run
from stillhouse.tune.pipeline_report import write_report
from stillhouse.tune.stage_record import RECORD, Record, read_record
from stillhouse.tune.stages import Stage

# A stage that writes what it reads; `trouble`/NAME makes it fail, wait for its end, or say something.
PROGRAM = """
import os, sys, time
from pathlib import Path

home, name, out, *reads = sys.argv[1:]
home, out = Path(home), Path(out)
with (home / "calls").open("a") as calls:
    calls.write(name + "\\n")
said = (home / "trouble" / name).read_text() if (home / "trouble" / name).exists() else ""
if (out / "half").exists():
    (out / "went on").touch()
elif said == "wait":
    (out / "half").write_text(str(os.getpid()))
    time.sleep(60)
if said.startswith("exit"):
    print("on my way", file=sys.stderr)
    print("error: the gate does not hold", "hint: more data", sep="\\n", file=sys.stderr)
    sys.exit(int(said.split()[1]))
if said == "kill":
    os.kill(os.getpid(), 9)
texts = [path.read_text() if (path := Path(each) / "result").exists() else each for each in reads]
(out / "result").write_text(" ".join(texts))
print('{"figures": 1}')
"""


@dataclass(frozen=True)
class Workshop:
    """A pipeline of small programs: raw → made → tried, and other beside them."""

    home: Path
    stages: list[Stage]

    @property
    def places(self) -> Places:
        return Places(self.home / "recipe.toml", self.home / "runs", self.home / "repository")

    @property
    def program(self) -> list[str]:
        return [sys.executable, str(self.home / "stage.py"), str(self.home)]

    def run(self) -> Record:
        return run(self.stages, self.places, program=self.program, on_end=self.report)

    def report(self, record: Record) -> Path:
        return write_report(self.stages, self.places, record)

    def calls(self) -> list[str]:
        """Which stages ran since the last time that this was asked."""
        file = self.home / "calls"
        called = file.read_text().split() if file.exists() else []
        file.unlink(missing_ok=True)
        return called

    def change(self, name: str, *, read: Any, said: str) -> Workshop:
        """Another setting of one stage, which makes it write `said`."""
        stages = [
            replace(stage, reads={"setting": read}, arguments=(name, "{out}", said)) if stage.name == name else stage
            for stage in self.stages
        ]
        return replace(self, stages=stages)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    (tmp_path / "stage.py").write_text(PROGRAM, "utf-8")
    (tmp_path / "trouble").mkdir()

    def stage(name: str, *reads: str, after: tuple[str, ...] = ()) -> Stage:
        return Stage(name, (name, "{out}", *reads), {"setting": 1}, after, lambda out: [out / "result"], ("*.png",))

    stages = [stage("raw", "one"), stage("other", "two"), stage("made", "{raw}", after=("raw",))]
    return Workshop(tmp_path, [*stages, stage("tried", "{made}", after=("made",))])


def statuses(record: Record) -> dict[str, str]:
    return {outcome.stage: outcome.status for outcome in record.last_run}


def test_a_second_run_does_nothing(workshop: Workshop) -> None:
    assert set(statuses(workshop.run()).values()) == {"done"}
    assert workshop.calls() == ["raw", "other", "made", "tried"]
    assert set(statuses(workshop.run()).values()) == {"unchanged"}
    assert workshop.calls() == []
    assert [each.why for each in plan(workshop.stages, workshop.places)] == [None] * 4


def test_what_has_changed_runs_again_and_what_depends_on_it_and_nothing_else(workshop: Workshop) -> None:
    workshop.run()
    workshop.calls()
    changed = workshop.change("raw", read=2, said="other words")
    planned = plan(changed.stages, changed.places)
    assert [each.why for each in planned] == [
        "changed: setting", None, "reads the result of raw", "reads the result of made",
    ]  # fmt: skip
    record = changed.run()
    assert changed.calls() == ["raw", "made", "tried"]
    assert record.last_run[2].why == "changed: raw's result"
    workshop.run()  # as it was at first: all of that is still there
    assert workshop.calls() == []


def test_where_a_stage_comes_to_the_same_result_those_after_it_stay(workshop: Workshop) -> None:
    workshop.run()
    workshop.calls()
    workshop.change("raw", read=2, said="one").run()
    assert workshop.calls() == ["raw"]


@pytest.mark.parametrize("killed", [False, True])
def test_what_moves_the_live_version_runs_again_where_other_inputs_moved_it_since(
    killed: bool, workshop: Workshop
) -> None:
    stages = [replace(stage, moves=stage.name == "tried") for stage in workshop.stages]
    workshop = replace(workshop, stages=stages)
    workshop.run()
    trouble = workshop.home / "trouble" / "tried"
    trouble.write_text("kill" if killed else "")  # it may have moved it before that
    with pytest.raises(StillhouseError) if killed else contextlib.nullcontext():
        workshop.change("raw", read=2, said="other words").run()
    trouble.unlink()
    workshop.calls()
    assert [each.stage.name for each in plan(workshop.stages, workshop.places) if each.why] == ["tried"]
    workshop.run()
    assert workshop.calls() == ["tried"]
    workshop.run()
    assert workshop.calls() == []


def test_what_changed_while_its_stage_ran_is_not_taken_for_its_result(workshop: Workshop) -> None:
    now = workshop.change("raw", read=2, said="other words")
    with pytest.raises(StillhouseError, match=r"^raw: setting changed while it ran$") as stopped:
        run(workshop.stages, workshop.places, program=workshop.program, again=lambda: now.stages)
    assert stopped.value.hint == "run it again"
    assert (read_record(workshop.places.run).done, list(workshop.places.run.glob("raw-*"))) == ([], [])
    workshop.calls()
    record = run(now.stages, now.places, program=now.program, again=lambda: now.stages)
    assert set(statuses(record).values()) == {"done"}


def test_braces_that_name_no_place_stay_as_they_are(workshop: Workshop) -> None:
    workshop.change("raw", read=2, said="{nowhere} {out").run()
    (result,) = workshop.places.run.glob("raw-*/result")
    assert result.read_text() == "{nowhere} {out"


@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_a_result_that_is_no_longer_what_it_was_is_made_again(workshop: Workshop, harm: str) -> None:
    workshop.run()
    workshop.calls()
    (result,) = workshop.places.run.glob("made-*/result")
    if harm == "changed":
        result.write_text("something else")
    else:
        result.unlink()
    (again,) = [each for each in plan(workshop.stages, workshop.places) if each.stage.name == "made"]
    assert again.why == "its result is gone or was changed"
    workshop.run()
    assert workshop.calls() == ["made"]


def test_a_stage_that_fails_stops_the_rest_and_leaves_what_was_before(workshop: Workshop) -> None:
    (workshop.home / "trouble" / "made").write_text("exit 1")
    with pytest.raises(StillhouseError, match=r"^made: the gate does not hold$") as stopped:
        workshop.run()
    assert (stopped.value.exit_code, stopped.value.hint) == (1, "more data")
    assert workshop.calls() == ["raw", "other", "made"]
    assert statuses(read_record(workshop.places.run)) == {
        "raw": "done", "other": "done", "made": "failed", "tried": "not run",
    }  # fmt: skip
    assert "the gate does not hold" in (workshop.places.run / "report.html").read_text("utf-8")
    assert next(workshop.places.run.glob("made-*/stderr.txt")).read_text().startswith("on my way\n")
    (workshop.home / "trouble" / "made").unlink()
    workshop.run()
    assert workshop.calls() == ["made", "tried"]


@pytest.mark.parametrize(
    ("trouble", "kind", "words"),
    [("exit 2", UsageError, "the gate does not hold"), ("kill", StillhouseError, "most likely because memory ran out")],
)
def test_how_a_stage_ended_is_said(workshop: Workshop, trouble: str, kind: type[StillhouseError], words: str) -> None:
    (workshop.home / "trouble" / "raw").write_text(trouble)
    with pytest.raises(kind, match=f"^raw: .*{words}"):
        workshop.run()


def test_killed_in_the_middle_it_goes_on_in_the_same_place(workshop: Workshop, wait_until: Any) -> None:
    (workshop.home / "trouble" / "made").write_text("wait")
    script = workshop.home / "run.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom stillhouse.tune.pipeline import Places, run\n"
        "from stillhouse.tune.stages import Stage\n"
        f"home = Path({str(workshop.home)!r})\n"
        "result = lambda out: [out / 'result']\n"
        "stages = [Stage(name, (name, '{out}', *reads), {'setting': 1}, after, result) for name, reads, after in [\n"
        "  ('raw', ['one'], ()), ('other', ['two'], ()), ('made', ['{raw}'], ('raw',))]]\n"
        "places = Places(home / 'recipe.toml', home / 'runs', home / 'repository')\n"
        "run(stages, places, program=[sys.executable, str(home / 'stage.py'), str(home)])\n",
        "utf-8",
    )
    pipeline = subprocess.Popen([sys.executable, str(script)])
    try:
        wait_until(lambda: any(file.read_text() for file in workshop.places.run.glob("made-*/half")))
        with pytest.raises(StillhouseError, match="another pipeline runs in"):
            workshop.run()
    finally:
        pipeline.kill()
        pipeline.wait()
    (half,) = workshop.places.run.glob("made-*/half")
    wait_until(lambda: not alive(int(half.read_text())))  # the stage has not outlived it
    assert [done.stage for done in read_record(workshop.places.run).done] == ["raw", "other"]
    workshop.calls()
    assert statuses(workshop.run())["raw"] == "unchanged"
    assert workshop.calls() == ["made", "tried"]
    assert (half.parent / "went on").exists()


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"


def test_a_record_that_is_broken_is_named(workshop: Workshop) -> None:
    workshop.run()
    (workshop.places.run / RECORD).write_text('{"done"')
    with pytest.raises(StillhouseError, match=r"stages\.json cannot be read"):
        workshop.run()


def test_the_report_holds_every_picture_and_fetches_nothing(workshop: Workshop) -> None:
    pixel = bytes.fromhex("89504e470d0a1a0a")
    record = workshop.run()
    (folder,) = workshop.places.run.glob("made-*")
    (folder / "curve.png").write_bytes(pixel)
    (folder / "stdout.txt").write_text("<b> & figures")
    page = workshop.report(record).read_text("utf-8")
    assert page.count("<h2>") == 4
    assert page.count("data:image/png;base64,iVBORw0KGgo=") == 1
    assert "&lt;b&gt; &amp; figures" in page
    assert not re.search(r"(src|href)\s*=\s*\"(?!data:)|url\(|@import|<script", page)
    assert "prefers-color-scheme: dark" in page
    assert all(outcome.key and outcome.key in page for outcome in record.last_run)


@pytest.mark.parametrize("made_before", [False, True])
def test_a_signal_ends_the_stage_too_and_it_goes_on_from_there(
    made_before: bool, workshop: Workshop, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_process, "GRACE_S", 0.2)
    if made_before:
        workshop.run()
        next(workshop.places.run.glob("raw-*/result")).unlink()
    (workshop.home / "trouble" / "raw").write_text("wait")

    def interrupt() -> None:
        wait_until(lambda: any(file.read_text() for file in workshop.places.run.glob("raw-*/half")))
        os.kill(os.getpid(), signal.SIGINT)

    user = threading.Thread(target=interrupt)
    user.start()
    with pytest.raises(KeyboardInterrupt):
        workshop.run()
    user.join()
    (half,) = workshop.places.run.glob("raw-*/half")
    wait_until(lambda: not alive(int(half.read_text())))
    (workshop.home / "trouble" / "raw").unlink()
    assert statuses(workshop.run())["raw"] == "done"
    assert (half.parent / "went on").exists()
