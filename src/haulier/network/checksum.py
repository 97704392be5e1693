"""The checksum of IP, ICMP, TCP and UDP. Pure."""

from __future__ import annotations

import struct


def checksum(data: bytes) -> int:
    """The Internet's checksum (RFC 1071), 16 bits."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
