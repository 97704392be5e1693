"""Tells the neighbours of a site's bridge where a guest is now: gratuitous ARP, sent on the bridge.

QEMU announces its guests' MAC addresses by RARP when they arrive; this also names the IP address, and works for
containers.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from typing import Final

ETH_ARP: Final = 0x0806
_BROADCAST: Final = b"\xff" * 6
_REQUEST: Final = 1


def gratuitous_arp(mac: str, address: str) -> bytes:
    """An Ethernet frame: an ARP request of the guest for its own address (RFC 5227 calls it an announcement). Pure."""
    own, ip = bytes.fromhex(mac.replace(":", "")), ipaddress.IPv4Address(address).packed
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, _REQUEST) + own + ip + bytes(6) + ip
    return (_BROADCAST + own + struct.pack("!H", ETH_ARP) + body).ljust(60, b"\0")


def announce(mac: str, address: str, bridge: str) -> bool:
    """Sends it to all ports of the bridge; False if the host does not let us."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((bridge, ETH_ARP))
        return sock.send(gratuitous_arp(mac, address)) > 0
    return False
