"""A version on this device: options put together, held against the memory, and loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from stillhouse.edge.device import Device
from stillhouse.edge.memory import describe_fit, fit, fits_instead
from stillhouse.edge.runtime import require_onnxruntime
from stillhouse.engine.directory import open_version
from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.model import LanguageModel
from stillhouse.engine.options import read_options

log = logging.getLogger(__name__)

ONE_ANSWER: Mapping[str, object] = {"max_num_seqs": 1}


def load(directory: Path, overrides: Mapping[str, object], limit_bytes: int | None = None) -> LanguageModel:
    """The version at `directory` with the options of engine.json, then `overrides`, then what the memory allows.

    Raises UsageError for an option that is none, VersionError for a directory that is no version, and StillhouseError
    where it does not fit into `limit_bytes` or what the device has available; nothing is loaded then.
    """
    require_onnxruntime()
    manifest = open_version(directory, verify=False).manifest
    options = read_options(directory.resolve().parent, dict(overrides))
    options = fit(manifest, options, limit_bytes, Device().memory().available_bytes)
    if limit_bytes is not None:
        log.info("%s", describe_fit(manifest, options, limit_bytes))
    return LanguageModel.load(directory, options)


def fits_instead_of(version: Path, loaded: Path) -> bool:
    """Whether the memory holds the version at `version` once that at `loaded` has gone; False where one is broken."""
    try:
        new, old = (open_version(directory, verify=False).manifest for directory in (version, loaded))
    except StillhouseError:
        return False
    return fits_instead(new, old, Device().memory().available_bytes)
