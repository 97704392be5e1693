"""What a chunk is called: the BLAKE3-256 of its 64 KiB."""

from __future__ import annotations

from typing import Final

from blake3 import blake3

from haulier.units import CHUNK

Buffer = bytes | bytearray | memoryview

ZERO_CHUNK: Final = bytes(CHUNK)
"""A chunk of zeros. It is never stored nor sent."""


def fingerprint(data: Buffer) -> bytes:
    """The 32-byte name of `data`. A chunk is exactly CHUNK bytes; the tail of a disk is padded with zeros."""
    return blake3(data).digest()


ZERO: Final = fingerprint(ZERO_CHUNK)
"""Fingerprint of a chunk of zeros."""
