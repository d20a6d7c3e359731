"""Where a base or an adapter lies: a folder, or the hub's snapshot of an id (HF_TOKEN and HF_ENDPOINT hold)."""

from __future__ import annotations

from pathlib import Path

from stillhouse.engine.errors import StillhouseError, UsageError

_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


def folder_of(source: str, revision: str | None, role: str, *, code: bool = False) -> Path:
    """The folder of `source`; an id's files are downloaded, its Python files only where `code` says so.

    Raises UsageError where there is no such folder or id, StillhouseError where the hub does not give it.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise StillhouseError(f"{role}: {source} is a file, not a folder", hint="name the folder that holds it")
    if Path(source).is_absolute():
        raise UsageError(
            f"{role}: no such folder: {source}",
            hint="paths in a recipe are relative to the recipe; a hub id looks like owner/name",
        )
    return _download(source, revision, role, [*_DOWNLOADED, "*.py"] if code else _DOWNLOADED)


def _download(source: str, revision: str | None, role: str, patterns: list[str]) -> Path:
    """The hub's snapshot of `source`, from the local hub cache where it is there."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        return Path(hub.snapshot_download(source, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise StillhouseError(
            f"{role}: {source} is gated", hint="accept its terms on the hub, then set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UsageError(f"{role}: {source} has no revision {revision!r}", hint="see its commits") from None
    except errors.RepositoryNotFoundError:
        raise UsageError(
            f"{role}: {source} is neither a folder nor on the hub",
            hint="check the spelling; private ones need HF_TOKEN",
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise StillhouseError(
            f"{role}: {source} is not a folder, and the hub cannot be reached: {first_line}",
            hint="name a local folder, or check the network, HF_ENDPOINT and HF_HUB_OFFLINE",
        ) from None
