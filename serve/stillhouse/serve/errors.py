"""The errors of serve.

StillhouseError
└── ServeError              the server cannot be started as asked
    ├── PortInUse           somebody else listens there
    ├── TritonNotFound      no tritonserver, or a part of it is missing
    ├── ServerFailed        the server ended, or a model did not load
    └── PromotionFailed     a version did not come up; what was live before is live
"""

from __future__ import annotations

from stillhouse.engine.errors import StillhouseError


class ServeError(StillhouseError):
    """The server cannot be started as asked."""


class PortInUse(ServeError):
    """Somebody else listens on a port that was asked for."""


class TritonNotFound(ServeError):
    """No tritonserver was found, or a part of it is missing."""


class ServerFailed(ServeError):
    """The server ended by itself, or a model did not load."""


class PromotionFailed(ServeError):
    """A version did not come up; what was live before is live."""
