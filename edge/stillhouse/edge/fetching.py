"""Files from a static HTTP server: resumed where they broke off, and held against their size and sha256."""

from __future__ import annotations

import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillhouse.engine.directory import sha256_of
from stillhouse.engine.errors import NotThereError, StillhouseError
from stillhouse.engine.manifest import FileRecord

_TIMEOUT_S = 30.0
_PIECE_BYTES = 1 << 20
_TEXT_BYTES = 1 << 22
# A connection that breaks is tried anew, as often as this without a byte of progress.
_TRIES = 5
_YEAR_OF_A_SET_CLOCK = 2024
Progress = Callable[[int], None]  # bytes that have come


class _Broken(Exception):
    """The connection ended before the file did; another try goes on there."""


def fetch_text(url: str) -> str | None:
    """The text at `url`; None where the server has none. Raises StillhouseError where it cannot be had."""
    try:
        with _opened(url, {}) as response:
            content = response.read(_TEXT_BYTES + 1)
    except NotThereError:
        return None
    except (_Broken, OSError, http.client.HTTPException) as error:
        raise StillhouseError(
            f"{url} cannot be fetched: {error}", hint="is the server up, and the address right?"
        ) from error
    if len(content) > _TEXT_BYTES:
        raise StillhouseError(f"{url} is no text of ours: it has more than {_TEXT_BYTES} bytes")
    return str(content.decode("utf-8", "replace"))


def fetch_file(url: str, target: Path, record: FileRecord, progress: Progress) -> None:
    """Fetches `url` into `target`, going on behind what is there; fsynced, and as `record` says.

    Raises StillhouseError where the server does not have it, breaks off for good, or sends something else: then
    nothing of it stays. Raises OSError where it cannot be written.
    """
    if not (target.is_file() and target.stat().st_size == record.bytes and sha256_of(target) == record.sha256):
        resumed = target.is_file() and target.stat().st_size > 0
        _download(url, target, record.bytes, progress)
        if resumed and not _is_sound(target, record):
            # What was there before may be what is wrong.
            target.unlink()
            _download(url, target, record.bytes, progress)
    if not _is_sound(target, record):
        found = sha256_of(target)
        target.unlink()
        raise StillhouseError(
            f"{url} is not what its manifest says: sha256 {found[:12]}…, expected {record.sha256[:12]}…",
            hint="the file was changed on the server or on the way; nothing of it was kept",
        )
    # Also of what an earlier call wrote, which may have been killed before it did this.
    with target.open("rb") as stream:
        os.fsync(stream.fileno())


def _is_sound(target: Path, record: FileRecord) -> bool:
    return target.stat().st_size == record.bytes and sha256_of(target) == record.sha256


def _download(url: str, target: Path, size: int, progress: Progress) -> None:
    tries = 0
    while True:
        before = target.stat().st_size if target.is_file() else 0
        if before > size:
            target.unlink()
            before = 0
        try:
            _transfer(url, target, before, size, progress)
            return
        except _Broken as error:
            tries = 1 if target.is_file() and target.stat().st_size > before else tries + 1
            if tries >= _TRIES:
                have = target.stat().st_size if target.is_file() else 0
                raise StillhouseError(
                    f"{url} broke off at byte {have} of {size}: {error}", hint="run it again: it goes on from there"
                ) from error
            time.sleep(0.2 * tries)


def _transfer(url: str, target: Path, begin: int, size: int, progress: Progress) -> None:
    """One connection's worth, appended to the `begin` bytes there. Raises _Broken where it ends too early."""
    if begin == size and size > 0:
        return
    with _opened(url, {"Range": f"bytes={begin}-"} if begin else {}) as response:
        # A server without ranges sends the whole file, with 200 instead of 206.
        goes_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {begin}-")
        with target.open("ab" if begin and goes_on else "wb") as stream:
            have = begin if begin and goes_on else 0
            progress(have)
            while have <= size and (piece := _read(response)):
                stream.write(piece)
                have += len(piece)
                progress(have)
    if have < size:
        raise _Broken("the server ended the transfer")


def _read(response: Any) -> bytes:
    """What has come, at most a piece. Raises _Broken for whatever the network does; writing has its own errors."""
    try:
        return bytes(response.read1(_PIECE_BYTES))
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from error


def _opened(url: str, headers: dict[str, str]) -> Any:
    """The response to a GET. Raises NotThereError for 404, StillhouseError for other refusals, _Broken for the rest."""
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", **headers})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            raise NotThereError(
                f"{url} is not on the server", hint="give the address of a model or of a version"
            ) from None
        if error.code >= 500:
            raise _Broken(f"the server says {error.code} {error.reason}") from None
        raise StillhouseError(f"{url}: the server says {error.code} {error.reason}") from None
    except ValueError as error:
        raise StillhouseError(f"{url} is no address: {error}", hint="it begins with http:// or https://") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise _untrusted(url, error.reason) from None
        if isinstance(error.reason, (FileNotFoundError, IsADirectoryError)):
            raise NotThereError(f"{url} is not there") from None
        raise _Broken(str(error.reason)) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from error
    if url.startswith("https:") and not response.url.startswith("https:"):
        response.close()
        raise StillhouseError(
            f"{url}: the server leads to {response.url}, which is not encrypted",
            hint="name that address itself where it is to be trusted",
        )
    return response


def _untrusted(url: str, error: ssl.SSLCertVerificationError) -> StillhouseError:
    today = time.strftime("%Y-%m-%d")
    if time.gmtime().tm_year < _YEAR_OF_A_SET_CLOCK:
        return StillhouseError(
            f"{url}: its certificate cannot be checked, because this device's clock says {today}",
            hint="set the clock: 'sudo date -s …' or 'sudo timedatectl set-ntp true'",
        )
    return StillhouseError(f"{url}: its certificate is not trusted: {error.verify_message} (today is {today})")
