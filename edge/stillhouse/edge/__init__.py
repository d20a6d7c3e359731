"""The edge: a version directory answers on the device itself, without a server."""
