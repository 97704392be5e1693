"""What the target's QEMU says back to the source's during a migration, as messages; and the one that we may say for it.

    be16 type, be16 length, contents

    1 SHUT          be32 status; the last one
    2 PONG          be32, the number of the PING that it answers
    3 REQ_PAGES_ID  be64 address, be32 bytes, len idstr: pages that the guest waits for there
    4 REQ_PAGES     be64 address, be32 bytes: the same, of the RAM block that was named last
    5 RECV_BITMAP   len idstr; then be64 size, a bitmap of that size (one bit a page, little-endian words of 64 bits,
                    a multiple of 8 bytes), be64 0x0123456789abcdef: pages of the block that have arrived
    6 RESUME_ACK    be32 1: the broken migration goes on
    7 SWITCHOVER_ACK

A ReturnPathParser only looks: its caller carries the bytes on, untouched.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from haulier.errors import Corrupt
from haulier.memory import format as q
from haulier.units import PAGE

SHUT: Final = 1
PONG: Final = 2
REQ_PAGES_ID: Final = 3
REQ_PAGES: Final = 4
RECV_BITMAP: Final = 5
RESUME_ACK: Final = 6
SWITCHOVER_ACK: Final = 7

_LENGTHS: Final = {SHUT: 4, PONG: 4, REQ_PAGES: 12, RESUME_ACK: 4, SWITCHOVER_ACK: 0}
_HEAD: Final = struct.Struct(">HH")
_REQUEST: Final = struct.Struct(">QI")
_ENDING: Final = 0x0123456789ABCDEF
MAX_REQUEST: Final = 1 << 30
"""Bytes that one request may ask for: a huge page."""


@dataclass(frozen=True, slots=True)
class Shut:
    """The target has ended its part; 0 = well."""

    status: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to a PING of the stream."""

    number: int


@dataclass(frozen=True, slots=True)
class Request:
    """Pages that the guest waits for at the target: `start` and `length` in bytes, whole pages."""

    block: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Received:
    """Of `block`, how many pages have arrived."""

    block: str
    pages: int


@dataclass(frozen=True, slots=True)
class ResumeAck:
    """A broken migration goes on."""


@dataclass(frozen=True, slots=True)
class SwitchoverAck:
    """The target is ready for the switchover."""


Message = Shut | Pong | Request | Received | ResumeAck | SwitchoverAck


class ReturnPathParser:
    """Bytes in, messages out. `blocks`: idstr to bytes of each RAM block; to be set before the first that names one.

    `block` is the one that a request names that names none: the last that was.
    """

    def __init__(self, blocks: Mapping[str, int]) -> None:
        self.blocks = blocks
        self.block: str | None = None
        self._buffer = b""
        self._bitmap: str | None = None
        self._skip = 0
        self._ones = 0

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes. Corrupt for what no QEMU says, or not of this guest's memory."""
        out: list[Message] = []
        self._buffer = self._buffer + data if self._buffer else data
        while self._step(out):
            pass
        return out

    @property
    def idle(self) -> bool:
        """The last message has come to its end."""
        return not self._buffer and self._bitmap is None

    def _step(self, out: list[Message]) -> bool:
        if self._bitmap is not None:
            return self._bits(self._bitmap, out)
        buffer = self._buffer
        if len(buffer) < _HEAD.size:
            return False
        kind, length = _HEAD.unpack_from(buffer)
        if kind in (REQ_PAGES_ID, RECV_BITMAP):
            fixed = 13 if kind == REQ_PAGES_ID else 1
            if not fixed < length <= fixed + 255:
                raise Corrupt(f"message {kind} of the return path has {length} bytes, which cannot be")
        elif _LENGTHS.get(kind, -1) != length:
            raise Corrupt(
                f"the return path holds message {kind} of {length} bytes, which QEMU 8.2 to 10.x does not say"
            )
        if len(buffer) < _HEAD.size + length:
            return False
        body = buffer[_HEAD.size : _HEAD.size + length]
        self._buffer = buffer[_HEAD.size + length :]
        self._take(kind, body, out)
        return True

    def _take(self, kind: int, body: bytes, out: list[Message]) -> None:
        if kind == SHUT:
            out.append(Shut(*struct.unpack(">I", body)))
        elif kind == PONG:
            out.append(Pong(*struct.unpack(">I", body)))
        elif kind in (REQ_PAGES, REQ_PAGES_ID):
            start, length = _REQUEST.unpack_from(body)
            if kind == REQ_PAGES_ID:
                self.block = self._name(body[_REQUEST.size :])
            if self.block is None:
                raise Corrupt("the return path asks for pages before it has named a RAM block")
            if start % PAGE or length % PAGE or not 0 < length <= MAX_REQUEST:
                raise Corrupt(f"the return path asks for {length} bytes at {start:#x}, which are no pages")
            if start + length > self.blocks[self.block]:
                raise Corrupt(f"the return path asks for {start:#x}, beyond the end of RAM block {self.block!r}")
            out.append(Request(self.block, start, length))
        elif kind == RECV_BITMAP:
            self._bitmap, self._skip = self._name(body), 0
        elif kind == RESUME_ACK:
            if struct.unpack(">I", body) != (1,):
                raise Corrupt("the return path acknowledges a resumption with another value than QEMU's")
            out.append(ResumeAck())
        else:
            out.append(SwitchoverAck())

    def _name(self, data: bytes) -> str:
        if len(data) != 1 + data[0]:
            raise Corrupt("the return path names a RAM block of another length than it says")
        name = q.name_of(data[1:], "RAM block")
        if name not in self.blocks:
            raise Corrupt(f"the return path speaks of RAM block {name!r}, which the guest does not have")
        return name

    def _bits(self, block: str, out: list[Message]) -> bool:
        buffer = self._buffer
        if not self._skip:
            if len(buffer) < 8:
                return False
            (size,) = struct.unpack_from(">Q", buffer)
            if size != -(-self.blocks[block] // PAGE // 64) * 8:
                raise Corrupt(f"the bitmap of RAM block {block!r} has {size} bytes, which do not fit it")
            self._skip, self._ones = size + 8, 0
            self._buffer = buffer[8:]
            return True
        take = min(len(buffer), self._skip - 8)
        if take > 0:
            self._ones += int.from_bytes(buffer[:take], "little").bit_count()
            self._buffer, self._skip = buffer[take:], self._skip - take
            return True
        if self._skip != 8 or len(buffer) < 8:
            return False
        if struct.unpack_from(">Q", buffer) != (_ENDING,):
            raise Corrupt(f"the bitmap of RAM block {block!r} ends in another way than QEMU's")
        out.append(Received(block, min(self._ones, self.blocks[block] // PAGE)))
        self._buffer, self._bitmap, self._skip = buffer[8:], None, 0
        return True


def request(block: str, start: int, length: int) -> bytes:
    """The message that asks for these pages; QEMU passes over those that it has sent already."""
    name = block.encode()
    return _HEAD.pack(REQ_PAGES_ID, 13 + len(name)) + _REQUEST.pack(start, length) + bytes([len(name)]) + name
