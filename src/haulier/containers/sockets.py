"""Sockets of other processes, by duplicates of them: what they are, and a word to their peers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from haulier.network.checksum import checksum

SO_PROTOCOL: Final = 38
SO_DOMAIN: Final = 39
_PIDFD_GETFD: Final = 438
_TCP_REPAIR: Final = 19
_TCP_REPAIR_QUEUE: Final = 20
_TCP_QUEUE_SEQ: Final = 21
_NO_QUEUE: Final = 0
_RECV_QUEUE: Final = 1
_ESTABLISHED: Final = 1
_ACKED_AT: Final = 120
"""Where tcp_info has `tcpi_bytes_acked` (linux/tcp.h)."""
_URGES: Final = 3
"""A downtime of half a second leaves a peer with two doublings of its timer."""


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


def acknowledged(pids: list[int]) -> dict[int, int]:
    """Bytes that the peer of each established TCP connection has acknowledged, by the inode of its socket."""
    found: dict[int, int] = {}
    for pid, number in talking(pids):
        with contextlib.suppress(OSError), borrowed(pid, number) as sock:
            facts = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED_AT + 8)
            if len(facts) == _ACKED_AT + 8:
                found[os.fstat(sock.fileno()).st_ino] = struct.unpack_from("=Q", facts, _ACKED_AT)[0]
    return found


def probe(pids: list[int]) -> int:
    """Has both ends of each established TCP connection of processes that stand still send again what was lost; how
    many connections there are.

    This end: a connection that leaves repair mode sends a window probe, which its peer answers at once (tcp(7),
    TCP_REPAIR). The other end: see `urge`.
    """
    count = 0
    for pid, number in talking(pids):
        with contextlib.suppress(OSError), borrowed(pid, number) as sock:
            reuse = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_QUEUE, _RECV_QUEUE)
                expected = sock.getsockopt(socket.IPPROTO_TCP, _TCP_QUEUE_SEQ) & 0xFFFFFFFF
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_QUEUE, _NO_QUEUE)
            finally:
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 0)
                # Repair mode leaves it off.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            count += 1
            urge(sock.getsockname(), sock.getpeername(), expected)
    return count


def urge(local: tuple[str, int], peer: tuple[str, int], expected: int) -> None:
    """Has the peer of a TCP connection over IPv4 send again what it waits to be acknowledged, sooner than its timer.

    `expected` is the sequence number that this end waits for. A peer whose segments were lost doubles its timer each
    time. A message that this host could not be reached when that segment was sent, which is what happened, has it take
    back one doubling, and send at once if it has waited long enough by that (RFC 6069; Linux does it). Others take note
    and do nothing (RFC 1122, 4.2.3.9).
    """
    addresses = [one[0].removeprefix("::ffff:") for one in (local, peer)]
    if any(":" in address for address in addresses):
        return
    packet = unreachable((addresses[1], peer[1]), (addresses[0], local[1]), expected)
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        for _ in range(_URGES):
            raw.sendto(packet, (addresses[1], 0))


def unreachable(sender: tuple[str, int], receiver: tuple[str, int], sequence: int) -> bytes:
    """The ICMP message (RFC 792) that the host of `receiver` could not be reached by a TCP segment of `sender`."""
    ends = socket.inet_aton(sender[0]), socket.inet_aton(receiver[0])
    quoted = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0x4000, 64, socket.IPPROTO_TCP, 0, *ends)
    quoted = quoted[:10] + struct.pack("!H", checksum(quoted)) + quoted[12:]
    quoted += struct.pack("!HHI", sender[1], receiver[1], sequence)
    message = struct.pack("!BBHI", 3, 1, 0, 0) + quoted
    return message[:2] + struct.pack("!H", checksum(message)) + message[4:]
