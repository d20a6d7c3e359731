"""versions, inspect, diff and remove for the command line: what is there, and how it came to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stillhouse.build.commands import AsJson, Repository
from stillhouse.engine.errors import UsageError, VersionError


def versions(
    repository: Repository = Path("model_repository"),
    verify: Annotated[bool, typer.Option("--verify", help="Re-hash every file.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the versions of a model repository.

    Example: stillhouse versions --verify
    """
    from stillhouse.build.report import print_table, versions_table
    from stillhouse.engine.directory import model_directories, version_numbers
    from stillhouse.engine.policy import other_backend

    rows = [
        _version_row(model / str(number), verify)
        for model in model_directories(repository)
        if other_backend(model) is None
        for number in version_numbers(model)
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif rows:
        print_table(versions_table(rows, verified=verify))
    else:
        print(f"{repository} holds no version")
    broken = [row for row in rows if row["files"] not in ("whole", "not verified")]
    if broken:
        raise VersionError(
            f"{len(broken)} of {len(rows)} versions are not whole: {broken[0]['files']}",
            hint="build them again with 'stillhouse build'; the engine refuses to load them",
        )


def inspect(
    directory: Annotated[
        Path | None, typer.Argument(help="A version, e.g. model_repository/support-int4/1.", show_default=False)
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of manifest.json.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what one version is and how it came to be.

    Example: stillhouse inspect model_repository/support-int4/1
    """
    from stillhouse.build.report import manifest_table, print_table
    from stillhouse.engine.directory import open_version
    from stillhouse.engine.manifest import schema_json

    if schema:
        print(schema_json(), end="")
        return
    if directory is None:
        raise UsageError("inspect needs a version's directory", hint="e.g. model_repository/support-int4/1")
    version = open_version(directory, verify=False)
    if as_json:
        print(version.manifest.to_json(), end="")
    else:
        print_table(manifest_table(version.path, version.manifest))


def diff(
    left: Annotated[Path, typer.Argument(help="A version.")],
    right: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Show two versions side by side: how they were made, what they weigh, how good they are.

    Example: stillhouse diff model_repository/support-int4/1 model_repository/support-int4/2
    """
    from stillhouse.build.compare import differences
    from stillhouse.build.report import diff_table, print_table
    from stillhouse.engine.directory import open_version

    manifests = [open_version(directory, verify=False).manifest for directory in (left, right)]
    rows = differences(*manifests)
    if as_json:
        print(json.dumps({"left": str(left), "right": str(right), "rows": rows}, indent=2))
    else:
        print_table(diff_table(str(left), str(right), rows))


def remove(
    name: Annotated[str, typer.Argument(help="The model, e.g. support-int4.")],
    version: Annotated[int, typer.Argument(help="The version, e.g. 3.")],
    repository: Repository = Path("model_repository"),
) -> None:
    """Remove a version that is not live.

    Example: stillhouse remove support-int4 3
    """
    from stillhouse.build.remove import remove as remove_version

    freed = remove_version(repository, name, version)
    print(f"{name} version {version} is removed, {freed:,} bytes are free")


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
