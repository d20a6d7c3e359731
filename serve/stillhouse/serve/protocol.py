"""What the launcher and the backend, two processes apart, tell each other."""

from __future__ import annotations

# The backend's name: a model's config.pbtxt names it, and the backend directory has a folder called so.
BACKEND = "stillhouse"

# Launcher to backend: a JSON object of engine options that go on top of engine.json.
OPTIONS_VARIABLE = "STILLHOUSE_ENGINE_OPTIONS"

# Launcher to backend: the path of a file that is there once the server ends. It holds the moment, on the clock of
# time.monotonic(), at which what still runs is cut; see guard.py, which writes it.
DRAIN_VARIABLE = "STILLHOUSE_DRAIN_FILE"
DRAIN_FILE = "drain"

# Backend to launcher and guard: how many requests the process PID has under way, as 8 bytes, little-endian, in a file
# of this name and the PID beside the one above; see under_way.py.
UNDER_WAY_FILE = "under-way-"

# Backend to launcher: a line of the server's log that begins so, followed by a JSON object (model, version, message,
# hint), says why a model could not be loaded.
LOAD_ERROR_MARK = "stillhouse-load-error "
