"""Tells the neighbours of a site's bridge where a guest is now: gratuitous ARP, or a neighbour advertisement.

QEMU announces its guests' MAC addresses by RARP when they arrive; this also names the IP address, and works for
containers.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from typing import Final

from haulier.network.checksum import checksum

ETH_ARP: Final = 0x0806
ETH_IPV6: Final = 0x86DD
_BROADCAST: Final = b"\xff" * 6
_REQUEST: Final = 1


def gratuitous_arp(mac: str, address: str) -> bytes:
    """An Ethernet frame: an ARP request of the guest for its own address (RFC 5227 calls it an announcement). Pure."""
    own, ip = bytes.fromhex(mac.replace(":", "")), ipaddress.IPv4Address(address).packed
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, _REQUEST) + own + ip + bytes(6) + ip
    return (_BROADCAST + own + struct.pack("!H", ETH_ARP) + body).ljust(60, b"\0")


def neighbour_advertisement(mac: str, address: str) -> bytes:
    """An Ethernet frame: ICMPv6's answer that nobody asked for, to all nodes (RFC 4861, 7.2.6). Pure."""
    own, ip = bytes.fromhex(mac.replace(":", "")), ipaddress.IPv6Address(address).packed
    everybody = ipaddress.IPv6Address("ff02::1").packed
    # Overrides what neighbours remember; names the guest's MAC.
    body = struct.pack("!BBHI", 136, 0, 0, 1 << 29) + ip + b"\x02\x01" + own
    body = body[:2] + struct.pack("!H", checksum(ip + everybody + struct.pack("!II", len(body), 58) + body)) + body[4:]
    packet = struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + ip + everybody + body
    return b"\x33\x33\x00\x00\x00\x01" + own + struct.pack("!H", ETH_IPV6) + packet


def announce(mac: str, address: str, bridge: str) -> bool:
    """Sends it to all ports of the bridge; False if the host does not let us."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        six = ":" in address
        sock.bind((bridge, ETH_IPV6 if six else ETH_ARP))
        return sock.send(neighbour_advertisement(mac, address) if six else gratuitous_arp(mac, address)) > 0
    return False
