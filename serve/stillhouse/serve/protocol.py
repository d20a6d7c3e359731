"""What the launcher and the backend, two processes apart, tell each other."""

from __future__ import annotations

# The backend's name: a model's config.pbtxt names it, and the backend directory has a folder called so.
BACKEND = "stillhouse"

# Launcher to backend: a JSON object of engine options that go on top of engine.json.
OPTIONS_VARIABLE = "STILLHOUSE_ENGINE_OPTIONS"

# Launcher to backend: the path of a file that is there once the server ends. It holds the moment, on the clock of
# time.monotonic(), at which what still runs is cut; see guard.py, which writes it, and takes it from busy-PID beside it
# that something still runs.
DRAIN_VARIABLE = "STILLHOUSE_DRAIN_FILE"
DRAIN_FILE = "drain"

# Backend to launcher: a line of the server's log that begins so, followed by a JSON object (model, version, message,
# hint), says why a model could not be loaded.
LOAD_ERROR_MARK = "stillhouse-load-error "
