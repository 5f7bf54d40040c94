"""sd_notify(3): messages from a service to systemd."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Sends `state`, lines of NAME=VALUE, to the socket that NOTIFY_SOCKET names; does nothing where it names none."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@"):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(state.encode(), "\0" + path[1:] if path[0] == "@" else path)
    except OSError:
        pass  # systemd has closed the socket
