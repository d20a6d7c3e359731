"""Which model is asked: the one that was named, or the repository's int4."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.client import Client, ModelEntry
from stillhouse.loadtest.errors import BadInput


def choose_model(client: Client, wish: str) -> str:
    """`wish` if it is ready there; without a wish the first ready model ending in -int4, else the first.

    Raises BadInput where there is none, ClientError where the server cannot be asked.
    """
    ready = _names(client.models())
    if not ready:
        raise BadInput(f"{client.address.authority} has no model that is ready", hint="look at the server's log")
    if not wish:
        return next((name for name in ready if name.endswith("-int4")), ready[0])
    if wish not in ready:
        raise BadInput(f"no model {wish!r} on {client.address.authority}", hint=f"ready there: {', '.join(ready)}")
    return wish


def _names(entries: Sequence[ModelEntry]) -> list[str]:
    return sorted({entry.name for entry in entries if entry.ready})
