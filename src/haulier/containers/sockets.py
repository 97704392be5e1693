"""Sockets of other processes, by duplicates of them: what they are, and a word to their peers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

SO_PROTOCOL: Final = 38
SO_DOMAIN: Final = 39
_PIDFD_GETFD: Final = 438
_TCP_REPAIR: Final = 19
_ESTABLISHED: Final = 1


@contextlib.contextmanager
def borrowed(pid: int, number: int) -> Iterator[socket.socket]:
    """A duplicate of a process' socket, while the block lasts. OSError when there is none (any more)."""
    handle = os.pidfd_open(pid)
    try:
        copied = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, handle, number, 0)
        if copied < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
    finally:
        os.close(handle)
    with socket.socket(fileno=copied) as sock:
        yield sock


def talking(pids: list[int]) -> list[tuple[int, int]]:
    """(process, descriptor) of each established TCP connection, each once."""
    found: dict[str, tuple[int, int]] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = str(entry.readlink())
                    if target.startswith("socket:") and target not in found:
                        with borrowed(pid, int(entry.name)) as sock:
                            if _established(sock):
                                found[target] = pid, int(entry.name)
    return list(found.values())


def _established(sock: socket.socket) -> bool:
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL) not in (
        socket.IPPROTO_TCP,
    ):
        return False
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _ESTABLISHED


def probe(pids: list[int]) -> int:
    """Has each established TCP connection of processes that stand still ask its peer what it has got; how many did.

    A connection that leaves repair mode sends a window probe, which its peer answers at once (tcp(7), TCP_REPAIR); so
    what was lost on the way is found before a timer runs out.
    """
    count = 0
    for pid, number in talking(pids):
        with contextlib.suppress(OSError), borrowed(pid, number) as sock:
            reuse = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 0)
            # Repair mode leaves it off.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            count += 1
    return count
