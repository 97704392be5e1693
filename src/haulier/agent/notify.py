"""Tells the service manager how the agent is doing (the sd_notify protocol: one datagram to $NOTIFY_SOCKET)."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> bool:
    """Sends e.g. "READY=1"; False where no service manager listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            # a leading @ stands for the abstract name space, whose names begin with a zero byte
            sender.sendto(state.encode(), address.replace("@", "\0", 1))
        except OSError:
            return False
    return True
