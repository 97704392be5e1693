"""Listening on one port of several addresses."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from haulier.errors import NoRoom, UsageError

PENDING: int = 32
"""Connections that may be between accept and hello at once."""


def listen(bind: Sequence[str], port: int = 0, protocol: int = 0) -> tuple[list[socket.socket], int]:
    """Non-blocking listeners on every address of `bind`, and their port; 0 finds one that is free on all of them.

    Raises UsageError where one cannot be listened on, NoRoom where no port is free.
    """
    for _ in range(20):
        chosen, found = port, list[socket.socket]()
        try:
            for host in bind:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                sock = socket.socket(family, socket.SOCK_STREAM, protocol)
                found.append(sock)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # beside 0.0.0.0
                sock.setblocking(False)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((host, chosen))
                sock.listen(PENDING)
                chosen = sock.getsockname()[1]
        except OSError as e:
            for sock in found:
                sock.close()
            if port or len(bind) < 2:
                raise UsageError(f"cannot listen on {', '.join(bind)} port {port} ({e}): choose another") from e
            continue  # the port that the first address got is taken on the second: try another
        return found, chosen
    raise NoRoom(f"no port is free on all of {', '.join(bind)}: name one")
