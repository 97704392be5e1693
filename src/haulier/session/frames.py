"""Frames on one connection: bytes to tuples and back, nothing else.

Every frame is a header of 16 bytes and at most `MAX_PAYLOAD` bytes of payload; docs/formats/bulk-frames.md
gives them byte by byte. Nothing here knows channels' state, clocks or sockets.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

from haulier.errors import Corrupt

VERSION: Final = 2
MAGIC: Final = b"haulier\0"
CHANNELS: Final = 16

HEADER: Final = struct.Struct("!BBHIQ")
"""kind u8, channel u8, flags u16, payload length u32, number u64."""

MAX_PAYLOAD: Final = 65536 - HEADER.size
"""A full frame is exactly four TLS records."""
MAX_CONTROL: Final = 1024
"""Payload bound of every kind but DATA: a peer that has not proved itself can make us hold no more than this."""

END: Final = 1
"""Flag of DATA: the last frame of its message."""
ABORT: Final = 1
"""Flag of BYE: given up, not finished; the payload says why."""
RESERVE: Final = 1
"""Flag of PING: I keep this path in reserve, send data on another one if you can."""


class Kind(IntEnum):
    """What a frame is; the first byte of its header."""

    CHALLENGE = 1
    HELLO = 2
    WELCOME = 3
    REFUSED = 4
    DATA = 5
    ACK = 6
    STATE = 7
    PING = 8
    PONG = 9
    BYE = 10


class Frame(NamedTuple):
    """One frame as it was read."""

    kind: int
    channel: int
    flags: int
    number: int
    payload: bytes


_KNOWN_FLAGS: Final = {int(kind): 0 for kind in Kind} | {Kind.DATA: END, Kind.BYE: ABORT, Kind.PING: RESERVE}
_DATA: Final = int(Kind.DATA)


def encode(kind: int, channel: int = 0, flags: int = 0, number: int = 0, payload: bytes = b"") -> bytes:
    """One whole frame."""
    return HEADER.pack(kind, channel, flags, len(payload), number) + payload


class FrameReader:
    """Cuts what a connection received into frames.

    The caller reads into `space()`, says how much with `filled()`, then iterates. The buffer is as large as it
    will ever be from the start, whatever the peer sends. Raises Corrupt; the connection is of no use afterwards.
    """

    _SIZE: Final = 4 * 65536
    _LEAST: Final = 16384  # what one TLS record can hold: less space than this would split reads

    __slots__ = ("_buffer", "_end", "_start", "_view")

    def __init__(self) -> None:
        self._buffer = bytearray(self._SIZE)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0

    def space(self) -> memoryview:
        """Where the next bytes go; never empty once all whole frames have been taken."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._SIZE - self._end < self._LEAST:
            rest = bytes(self._view[self._start : self._end])
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return self._view[self._end :]

    def filled(self, count: int) -> None:
        """`count` bytes were written to the start of `space()`."""
        self._end += count

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """All frames that `data` completes; for callers that have bytes at hand rather than a socket."""
        frames: list[Frame] = []
        rest = memoryview(data)
        while len(rest):
            space = self.space()
            count = min(len(space), len(rest))
            space[:count] = rest[:count]
            self.filled(count)
            rest = rest[count:]
            frames.extend(self)
        return frames

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        start = self._start
        if self._end - start < 16:
            raise StopIteration
        kind, channel, flags, length, number = HEADER.unpack_from(self._buffer, start)
        if kind == _DATA:
            if length > MAX_PAYLOAD or flags & ~END or channel >= CHANNELS:
                raise Corrupt(
                    f"a data frame with channel {channel}, flags {flags:#x} and {length} bytes came from the peer "
                    "(at most channel 15, flags 1, 65520 bytes): check that both sites run the same haulier"
                )
        elif kind not in _KNOWN_FLAGS or flags & ~_KNOWN_FLAGS[kind] or length > MAX_CONTROL or channel >= CHANNELS:
            raise Corrupt(
                f"the peer sent something that is no frame (kind {kind}, channel {channel}, flags {flags:#x}, "
                f"{length} bytes): check that the port belongs to haulier and both sites run the same version"
            )
        body = start + 16
        end = body + length
        if self._end < end:
            raise StopIteration
        self._start = end
        return Frame(kind, channel, flags, number, bytes(self._view[body:end]))
