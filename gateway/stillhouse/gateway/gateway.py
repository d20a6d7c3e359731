"""The gateway's state: what it speaks to, whether it takes requests, who may ask."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stillhouse.engine.errors import UsageError
from stillhouse.gateway.errors import ModelUnknown, Unavailable, invalid
from stillhouse.gateway.generator import Figure, Generator, ServedModel
from stillhouse.gateway.metrics import Metrics

KEY_VARIABLE = "STILLHOUSE_API_KEY"


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask: with `keys`, only who brings one; pages of `cors_origins` may ask from a browser."""

    keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Access({len(self.keys)} keys, cors_origins={self.cors_origins})"


class Gateway:
    """Made empty: until a generator is plugged in, it says that the models are being loaded."""

    def __init__(self, access: Access | None = None) -> None:
        access = access or Access()
        self.cors_origins = access.cors_origins
        self.generator: Generator | None = None
        self.draining = False
        self.in_flight = 0
        self.metrics = Metrics(self._figures)
        self._keys = [_digest(key) for key in access.keys]

    def admits(self, authorization: str | None) -> bool:
        """Whether an Authorization header holds one of the keys; the time it takes tells nothing about them."""
        if not self._keys:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        # All are compared, whichever fits.
        fits = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(fits)

    def closed(self) -> str | None:
        """Why no request is taken now; None where they are."""
        if self.draining:
            return "the server is shutting down"
        return "the models are being loaded" if self.generator is None else None

    def fault(self) -> str | None:
        """What /health says: why requests cannot be answered now; None where they can."""
        return self.closed() or (self.generator.fault() if self.generator else None)

    def ready_generator(self) -> Generator:
        """What answers. Raises Unavailable while there is nothing."""
        if (reason := self.closed()) or self.generator is None:
            raise Unavailable(reason or "")
        return self.generator

    def models(self) -> Sequence[ServedModel]:
        return self.ready_generator().models()

    def only_model(self) -> ServedModel:
        """The one model that is served. Raises ApiError where there are several."""
        models = self.models()
        if len(models) != 1:
            raise invalid(f"model is missing: one of {', '.join(model.name for model in models)}", "model")
        return models[0]

    def model(self, name: str) -> ServedModel:
        """The live model called `name`. Raises ModelUnknown, or Unavailable where it is one that cannot answer now."""
        models, missing = self.models(), self.ready_generator().missing()
        for model in models:
            if model.name == name:
                return model
        if name in missing:
            raise Unavailable(f"{name} cannot answer now: {missing[name]}")
        known = ", ".join(model.name for model in models) or "none"
        raise ModelUnknown(f"The model {name[:200]!r} does not exist. Models here: {known}")

    def _figures(self) -> Iterable[Figure]:
        return self.generator.figures() if self.generator else ()


def read_keys(given: Sequence[str], file: Path | None, variable: str | None) -> tuple[str, ...]:
    """The API keys of the command line, of a file (one a line, `#` begins a comment) and of the environment.

    Raises UsageError for a file that cannot be read or holds no key, and for a key that no header can hold.
    """
    keys = [*given, *([] if variable is None else [variable])]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the API key file {file} cannot be read: {error}") from error
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UsageError(f"the API key file {file} holds no key", hint="write one key a line")
        keys += found
    if any(not key.isascii() or not key.isprintable() or " " in key or not key for key in keys):
        raise UsageError(
            "an API key must be printable ASCII without spaces, and not empty",
            hint=f"{KEY_VARIABLE} is set to nothing: give it a key, or unset it" if variable == "" else None,
        )
    return tuple(dict.fromkeys(keys))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
