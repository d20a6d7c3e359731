"""init and build for the command line; heavy rooms are imported when a command runs."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillhouse.engine.errors import StillhouseError, UsageError

if TYPE_CHECKING:
    from stillhouse.build.results import Build, BuildResult

log = logging.getLogger(__name__)

Repository = Annotated[Path, typer.Option(help="The model repository, as Triton is given it.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]


def build(
    recipe: Annotated[Path, typer.Argument(help="The recipe.toml.")],
    repository: Repository = Path("model_repository"),
    force: Annotated[bool, typer.Option(help="Make a new version even where the same inputs have one.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Run every stage, whatever is cached.")] = False,
    keep_live: Annotated[
        bool, typer.Option("--keep-live", help="Leave the live version as it is; publish beside it.")
    ] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Make a version live that was there already, too, where another one is.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and needed, do nothing.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="A folder for build.json and its picture, as well.", show_default="none")
    ] = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Merge, export, quantize, prove and publish what a recipe names.

    Example: stillhouse build examples/support/recipe.toml
    """
    from stillhouse.build import pipeline
    from stillhouse.build import plan as planning
    from stillhouse.build.recipe import load_recipe

    if live and keep_live:
        raise UsageError("--live and --keep-live say the opposite of each other", hint="give one of them")
    asked = load_recipe(recipe, changes or ())
    if dry_run:
        _say_plan(planning.dry_run(planning.plan(asked, repository, force=force)), as_json)
        return
    from stillhouse.build.progress import reporter_for_terminal
    from stillhouse.build.report import build_json, build_table, print_table, save_build

    finished: list[BuildResult] = []
    try:
        with reporter_for_terminal() as reporter:
            done = pipeline.build(
                asked, repository, force=force, no_cache=no_cache, make_live=not keep_live, reporter=reporter,
                on_result=finished.append,
            )  # fmt: skip
    except (StillhouseError, OSError):
        if finished and not as_json:  # what was done before the error stays done
            print_table(build_table(finished))
        raise
    if live:
        done = _with_live(done)
    _draw(done, repository, asked.name)
    if as_json:
        print(json.dumps(build_json(done), indent=2))
    else:
        print_table(build_table(done.results))
        for line in _aftermath(done):
            print(line)
    if output is not None:
        save_build(done, output)
    failed = [result for result in done.results if result.status == "failed"]
    if failed:
        raise StillhouseError(
            f"not published: {'; '.join(f'{result.model}: {result.reason}' for result in failed)}",
            hint=f"another [quantize.{failed[0].precision}] method or a wider [gate.{failed[0].precision}] "
            f"may do; figures and logs are in {done.log}",
        )


def init(
    directory: Annotated[Path, typer.Argument(help="Where recipe.toml is written.")] = Path(),
    name: Annotated[str, typer.Option(help="What the models are called.")] = "support",
) -> None:
    """Write a commented recipe.toml.

    Example: stillhouse init my-model
    """
    from stillhouse.build.starter import write_recipe

    print(write_recipe(directory, name))


def _draw(done: Build, repository: Path, name: str) -> None:
    """Draws the build's picture; one that cannot be written takes nothing from what was built."""
    from stillhouse.build.picture import draw_build

    try:
        draw_build(done, repository, name)
    except OSError as error:
        log.warning("warning: the picture could not be drawn: %s", error)


def _with_live(done: Build) -> Build:
    """Each version that is there is the live one now."""
    from stillhouse.build.publish import go_live

    results = [replace(each, live=go_live(each.path)) if each.path is not None else each for each in done.results]
    return replace(done, results=results)


def _aftermath(done: Any) -> list[str]:
    """What a build changed for who serves the repository, and where its log lies."""
    lines = []
    for result in done.results:
        if result.status == "unchanged":
            lines.append(
                f"{result.model}: the same inputs are version {result.version}; nothing new (--force makes one)"
            )
        if result.version is not None and result.version not in result.live:
            live = ", ".join(map(str, result.live))
            lines.append(
                f"{result.model}: version {result.version} is not live, {live} is; "
                f"version_policy in {result.path.parent / 'config.pbtxt'} decides"
            )
        elif result.status == "published":
            lines.append(f"{result.model}: version {result.version} is live at the next start or load")
    if done.log is not None:
        lines.append(f"log, figures and picture: {done.log}")
    return lines


def _say_plan(planned: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(planned, indent=2))
        return
    for version in planned["versions"]:
        there = version["existing"]
        what = (
            f"version {there} has the same inputs; nothing to do" if there else f"a new version ({version['method']})"
        )
        print(f"{version['model']}: {what}")
    if planned["stages"]:
        print(f"stages to run: {', '.join(planned['stages'])}; the rest is cached in {planned['cache']}")
    print(f"memory: about {planned['memory_bytes'] / 1e9:.1f} GB; this machine has {_memory_bytes() / 1e9:.1f} GB")
    print(f"disk: about {planned['disk_bytes'] / 1e9:.1f} GB; free there: {planned['disk_free_bytes'] / 1e9:.1f} GB")


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
