"""build, versions and inspect for the command line; heavy rooms are imported when a command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stillhouse.engine.errors import StillhouseError, VersionError

_Repository = Annotated[Path, typer.Option(help="The model repository, as Triton is given it.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]


def build(
    recipe: Annotated[Path, typer.Argument(help="The recipe.toml.")],
    repository: _Repository = Path("model_repository"),
    force: Annotated[bool, typer.Option(help="Make a new version even where the same inputs have one.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Run every stage, whatever is cached.")] = False,
    keep_live: Annotated[
        bool, typer.Option("--keep-live", help="Leave the live version as it is; publish beside it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and needed, do nothing.")] = False,
    as_json: _Json = False,
) -> None:
    """Merge, export, quantize, prove and publish what a recipe names.

    Example: stillhouse build examples/support/recipe.toml
    """
    from stillhouse.build import pipeline
    from stillhouse.build import plan as planning
    from stillhouse.build.recipe import load_recipe

    asked = load_recipe(recipe)
    if dry_run:
        _say_plan(planning.dry_run(planning.plan(asked, repository, force=force)), as_json)
        return
    from stillhouse.build.report import build_json, build_table, reporter_for_terminal

    with reporter_for_terminal() as reporter:
        done = pipeline.build(
            asked, repository, force=force, no_cache=no_cache, make_live=not keep_live, reporter=reporter
        )
    if as_json:
        print(json.dumps(build_json(done), indent=2))
    else:
        _print(build_table(done.results))
        for line in _aftermath(done):
            print(line)
    failed = [result for result in done.results if result.status == "failed"]
    if failed:
        raise StillhouseError(
            f"not published: {'; '.join(f'{result.model}: {result.reason}' for result in failed)}",
            hint=f"another [quantize.{failed[0].precision}] method or a wider [gate.{failed[0].precision}] "
            f"may do; figures and logs are in {done.log}",
        )


def versions(
    repository: _Repository = Path("model_repository"),
    verify: Annotated[bool, typer.Option("--verify", help="Re-hash every file.")] = False,
    as_json: _Json = False,
) -> None:
    """List the versions of a model repository.

    Example: stillhouse versions --verify
    """
    from stillhouse.build.report import versions_table
    from stillhouse.engine.directory import model_directories, version_numbers

    rows = [
        _version_row(model / str(number), verify)
        for model in model_directories(repository)
        for number in version_numbers(model)
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif rows:
        _print(versions_table(rows, verified=verify))
    else:
        print(f"{repository} holds no version")
    broken = [row for row in rows if row["files"] not in ("whole", "not verified")]
    if broken:
        raise VersionError(
            f"{len(broken)} of {len(rows)} versions are not whole: {broken[0]['files']}",
            hint="build them again with 'stillhouse build'; the engine refuses to load them",
        )


def inspect(
    directory: Annotated[Path, typer.Argument(help="A version, e.g. model_repository/support-int4/1.")],
    as_json: _Json = False,
) -> None:
    """Show what one version is and how it came to be.

    Example: stillhouse inspect model_repository/support-int4/1
    """
    from stillhouse.build.report import manifest_table
    from stillhouse.engine.directory import open_version

    version = open_version(directory, verify=False)
    if as_json:
        print(version.manifest.to_json(), end="")
    else:
        _print(manifest_table(version.path, version.manifest))


def _version_row(directory: Path, verify: bool) -> dict[str, Any]:
    from stillhouse.engine.directory import open_version, verify_files
    from stillhouse.engine.policy import live_versions

    row: dict[str, Any] = {
        "model": directory.parent.name,
        "version": int(directory.name),
        "precision": None,
        "target": None,
        "bytes": sum(file.stat().st_size for file in directory.iterdir() if file.is_file()),
        "perplexity_ratio": None,
        "created": None,
        "live": False,
        "files": "not verified",
    }
    try:
        version = open_version(directory, verify=False)
        manifest = version.manifest
        row["precision"], row["target"] = manifest.precision, manifest.target
        row["created"] = manifest.created.isoformat()
        row["perplexity_ratio"] = manifest.quality.perplexity_ratio if manifest.quality else None
        row["live"] = row["version"] in live_versions(directory.parent)
        if verify:
            verify_files(version)
            row["files"] = "whole"
    except VersionError as error:
        row["files"] = str(error)
    return row


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
        lines.append(f"build log: {done.log}")
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
    print(f"memory: about {planned['memory_bytes'] / 1e9:.1f} GB; disk: about {planned['disk_bytes'] / 1e9:.1f} GB")


def _print(table: Any) -> None:
    from rich.console import Console

    console = Console()
    # A pipe has no width: do not fold there.
    Console(width=None if console.is_terminal else 200).print(table)
