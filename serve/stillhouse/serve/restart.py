"""A new server in the place of one that has died, or cannot be repaired."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stillhouse.serve.backoff import Backoff
from stillhouse.serve.errors import ServeError, ServerFailed
from stillhouse.serve.launcher import ServeOptions, Server, start_server
from stillhouse.serve.others import other_models

log = logging.getLogger(__name__)


def restart(
    before: Server, options: ServeOptions, names: Sequence[str], stop: threading.Event, backoff: Backoff
) -> tuple[Server, set[str]]:
    """Ends `before` and starts another on its ports; with it, the models of `names` that had to be left out.

    A model that cannot be loaded costs the others nothing; where none can be, or Triton itself does not come up, it is
    tried again, later and later. Raises ServeError once `stop` is set, or where a start is not possible at all.
    """
    before.stop(at_once=True)
    _keep_log(before.log_file)
    left_out = set[str]()
    while True:
        ours = [name for name in names if name not in left_out]
        models = [*ours, *other_models(options.repository, options.models)]
        try:
            wanted = replace(options, ports=before.ports, log_file=before.log_file, models=models)
            server = start_server(wanted, stop=stop)
        except ServerFailed as error:
            log.warning("%s", error)
            if error.model in ours and len(ours) > 1:
                left_out.add(error.model)
                continue
            if stop.wait(backoff.next_s()):
                raise ServeError("stopped before the server was ready") from error
            left_out = set()  # it may have been another's fault that they could not be loaded
        else:
            backoff.over()
            server.openai_url = before.openai_url
            return server, left_out


def _keep_log(file: Path) -> None:
    """Puts the log beside that of the next server: it says what happened."""
    if file.is_file() and not file.is_symlink():  # as /dev/stdout is
        with contextlib.suppress(OSError):
            file.replace(f"{file}.1")
