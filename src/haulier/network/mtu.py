"""Whether a path carries a tunnel's full packets: found by echo requests that may not be cut, largest first.

What a router on the way would have to cut does not come back. Where nothing does (a firewall that drops echo requests),
what this host's route says is all that is known.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from haulier.network import iproute
from haulier.network.checksum import checksum

OVERHEAD: Final = {4: 50, 6: 70}
"""Bytes that a tunnel adds to a guest's packet: Ethernet 14, VXLAN 8, UDP 8, and IPv4 20 or IPv6 40."""
LADDER: Final = (9000, 1600, 1500, 1492, 1480, 1450, 1420, 1400, 1380, 1340, 1280, 1000, 576)
"""What paths carry: jumbo frames, Ethernet, PPPoE, tunnels of all kinds, the least of IPv6, and of IPv4."""
WAIT_S: Final = 0.7
# Of Linux; Python's socket module has no names for them.
_IP_MTU_DISCOVER, _IP_MTU, _IPV6_MTU_DISCOVER, _IPV6_MTU, _PROBE = 10, 14, 23, 24, 3


@dataclass(frozen=True)
class Carries:
    """The largest packet to an address, in bytes with its IP header: `route` as this host believes, `found` by probing.

    0 = not known.
    """

    route: int
    found: int

    @property
    def bytes(self) -> int:
        """What may be counted on; 0 = not known."""
        return self.found or self.route


def carries(address: str, wanted: int, wait_s: float = WAIT_S) -> Carries:
    """What goes to `address` in one piece, at most `wanted` bytes. Never fails."""
    route = _route(address)
    first = min(wanted, route or wanted)
    with contextlib.suppress(OSError), _Prober(address) as prober:
        if prober.ask([first], wait_s):
            return Carries(route, first)
        return Carries(route, prober.ask([size for size in LADDER if size < first], wait_s))
    return Carries(route, 0)


def _route(address: str) -> int:
    """As the kernel would send now: the interface's, the route's, or what a router has told it."""
    six = ":" in address
    level, option = (socket.IPPROTO_IPV6, _IPV6_MTU) if six else (socket.IPPROTO_IP, _IP_MTU)
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        sock.connect((address, 9))
        return sock.getsockopt(level, option)
    return 0


class _Prober:
    """Echo requests of chosen sizes to one address. OSError where the host lets nobody send them (it needs root)."""

    def __init__(self, address: str) -> None:
        self._six = ":" in address
        self._number = os.urandom(2)
        self._header = 48 if self._six else 28
        if self._six:
            self._sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        else:
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        try:
            level, option = (
                (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER) if self._six else (socket.IPPROTO_IP, _IP_MTU_DISCOVER)
            )
            # In one piece, whatever was learnt of the path before.
            self._sock.setsockopt(level, option, _PROBE)
            self._sock.connect((address, 0))
        except OSError:
            self._sock.close()
            raise

    def __enter__(self) -> _Prober:
        return self

    def __exit__(self, *error: object) -> None:
        self._sock.close()

    def ask(self, sizes: Sequence[int], wait_s: float) -> int:
        """The largest of `sizes` that was answered; 0 if none was."""
        for size in sizes:
            with contextlib.suppress(OSError):
                self._sock.send(self._request(size))
        best, over = 0, time.monotonic() + wait_s
        while best < max(sizes, default=0) and (left := over - time.monotonic()) > 0:
            if select.select([self._sock], [], [], left)[0]:
                with contextlib.suppress(OSError):
                    best = max(best, self._answered(self._sock.recv(1 << 16)))
        return best

    def _request(self, size: int) -> bytes:
        body = bytes(size - self._header)
        head = struct.pack("!BBH2sH", 128 if self._six else 8, 0, 0, self._number, size)
        # The kernel sums up ICMPv6 itself.
        check = 0 if self._six else checksum(head + body)
        return head[:2] + struct.pack("!H", check) + head[4:] + body

    def _answered(self, packet: bytes) -> int:
        message = packet if self._six else packet[(packet[0] & 15) * 4 :]
        if len(message) < 8 or message[0] != (129 if self._six else 0) or message[4:6] != self._number:
            return 0
        return int.from_bytes(message[6:8], "big")


# -- what it means for a tunnel ---------------------------------------------------------------------------------------


def of_bridge(bridge: str) -> int:
    """The MTU of the guests' bridge here: their full packets. HaulierError without one."""
    return int(iproute.facts("link", "show", "dev", bridge)[0]["mtu"])


def needed(address: str, guest: int) -> int:
    """What the path to `address` has to carry so that a guest's packets of `guest` bytes go through a tunnel whole."""
    return guest + OVERHEAD[ipaddress.ip_address(address).version]


def advice(address: str, guest: int, found: Carries) -> str:
    """What a guest's full packets meet in a tunnel to `address`, and what to do; "" if they fit. Pure."""
    wanted = needed(address, guest)
    if not found.bytes:
        return f"it is not known whether the path to {address} carries packets of {wanted} bytes, as a tunnel needs"
    if found.bytes >= wanted:
        return ""
    fits = found.bytes - (wanted - guest)
    return (
        f"a tunnel to {address} carries guests' packets of {fits} bytes whole, as the path takes {found.bytes}: those "
        f"up to {guest} are cut in two, or sent again smaller (raise the path's MTU to {wanted}, or set one of {fits} "
        "in the guest)"
    )
