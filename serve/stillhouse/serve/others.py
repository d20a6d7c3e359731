"""Models of other backends in the repository: Triton serves them beside ours, and nobody here looks after them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stillhouse.engine.directory import model_directories
from stillhouse.engine.policy import other_backend
from stillhouse.serve.errors import ServeError

if TYPE_CHECKING:
    from stillhouse.serve.control import TritonControl

log = logging.getLogger(__name__)


def other_models(repository: Path, names: Sequence[str] | None = None) -> list[str]:
    """The models called `names`, or all, whose config.pbtxt names another backend."""
    others = [directory.name for directory in model_directories(repository) if other_backend(directory) is not None]
    return others if names is None else [name for name in others if name in names]


def load_others(grpc_url: str, models: Sequence[str], hopeless: Callable[[str], str | None]) -> None:
    """Has Triton load `models`; one that it cannot load costs the others nothing.

    To be called once ours answer: an ensemble needs its members. `hopeless` is asked why there is no use in waiting
    for a model.
    """
    if not models:
        return
    # Loaded by those alone who need it: the launcher does without gRPC.
    from stillhouse.serve.control import TritonControl

    with contextlib.closing(TritonControl(grpc_url)) as triton:
        for model in models:
            _load(triton, model, hopeless)


def _load(triton: TritonControl, model: str, hopeless: Callable[[str], str | None]) -> None:
    try:
        triton.load(model, lambda: hopeless(model))
    except ServeError as error:
        log.warning("%s, of another backend, is left out: %s", model, error)
    else:
        log.info("%s, of another backend, is served too, but not by the gateway", model)
