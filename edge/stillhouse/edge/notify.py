"""What systemd is told of a service of Type=notify: that it is ready, that it is alive, that it ends (sd_notify(3))."""

from __future__ import annotations

import os
import socket

_SOCKET, _WATCHDOG, _PID = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"


def notify(*lines: str) -> bool:
    """Sends e.g. READY=1; False, and nothing happens, where no systemd listens."""
    address = os.environ.get(_SOCKET, "")
    if not address.startswith(("/", "@")):
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            # An address with @ lies in Linux' abstract namespace, which is written with a NUL.
            sender.sendto("\n".join(lines).encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
    except OSError:
        # Whoever asked for news has gone; that is no reason to stop.
        return False
    return True


def watchdog_s() -> float | None:
    """Seconds within which systemd wants to hear WATCHDOG=1; None where it does not."""
    if os.environ.get(_PID, str(os.getpid())) != str(os.getpid()):
        return None
    text = os.environ.get(_WATCHDOG, "")
    return int(text) / 1e6 if text.isdecimal() and int(text) > 0 else None
