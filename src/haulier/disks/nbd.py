"""A small NBD client, for reading a running QEMU's disk, its dirty bitmaps and its allocation depth.

QEMU answers a pipelined client much faster than one that asks and waits, so `read_many` keeps requests under way.
One reader is for one thread. An error leaves the connection unusable: close it and open another.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple

from haulier.disks import nbdproto as p
from haulier.errors import Corrupt, GuestError, UnknownThing

DEPTH: Final = 32
"""Requests under way at once in `read_many`; beyond 16 QEMU gains nothing, and 32 x 64 KiB is little memory."""
STATUS_SPAN: Final = 0x7FFF0000
"""Longest range of one block status request: QEMU takes under 2 GiB, and whole clusters give whole extents."""
MAX_REPLY: Final = (32 << 20) + 4096
"""Longest structured reply that is believed."""
TIMEOUT_S: Final = 60.0

_ALLOWED_CONTEXTS: Final = 8


class Extent(NamedTuple):
    """A range (bytes) of the disk with one value in one meta context."""

    offset: int
    length: int
    flags: int


class _Pending:
    """A read under way: what has come of it so far."""

    __slots__ = ("buffer", "filled", "offset")

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self.buffer = bytearray(length)
        self.filled = 0

    def part(self, offset: int, length: int) -> memoryview | None:
        """Where `length` bytes at disk offset `offset` go; None when they were not asked for."""
        at = offset - self.offset
        if at < 0 or at + length > len(self.buffer):
            return None
        self.filled += length
        return memoryview(self.buffer)[at : at + length]


class NbdReader:
    """Reads `export` on the unix socket `socket_path`, with the meta contexts named in `contexts`.

    Raises GuestError when the server cannot be reached or answers with an error, UnknownThing when it has no such
    export or context, Corrupt when it does not speak the protocol.
    """

    def __init__(
        self, socket_path: Path | str, export: str, contexts: Sequence[str] = (), timeout_s: float = TIMEOUT_S
    ) -> None:
        if len(contexts) > _ALLOWED_CONTEXTS:
            raise ValueError(f"{len(contexts)} meta contexts; at most {_ALLOWED_CONTEXTS}")
        self._what = f"NBD export {export!r} at {socket_path}"
        self._next_handle = 0
        self._context_ids: dict[str, int] = {}
        self.size = 0
        """Size of the disk in bytes."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_s)
            try:
                self._socket.connect(str(socket_path))
            except OSError as error:
                raise GuestError(f"{self._what} cannot be reached ({error}); is its server running?") from error
            self._handshake(export, contexts)
        except BaseException:
            self._socket.close()
            raise

    # -- bytes

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise GuestError(f"{self._what} went away ({error})") from error

    def _receive_into(self, view: memoryview) -> None:
        while view:
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                raise GuestError(f"{self._what} went away ({error})") from error
            if count == 0:
                raise GuestError(f"{self._what} closed the connection")
            view = view[count:]

    def _receive(self, count: int) -> bytearray:
        data = bytearray(count)
        self._receive_into(memoryview(data))
        return data

    # -- handshake

    def _handshake(self, export: str, contexts: Sequence[str]) -> None:
        head = self._receive(18)
        magic, flags = struct.unpack_from(">QH", head, 8)
        if head[:8] != p.NBDMAGIC or magic != p.IHAVEOPT or not flags & p.FLAG_FIXED_NEWSTYLE:
            raise Corrupt(f"{self._what} does not speak NBD (fixed newstyle)")
        self._send(struct.pack(">I", p.FLAG_FIXED_NEWSTYLE | (flags & p.FLAG_NO_ZEROES)))
        name = export.encode()
        counted = struct.pack(">I", len(name)) + name
        self._option(p.OPT_STRUCTURED_REPLY, b"", "structured replies")
        if contexts:
            queries = b"".join(struct.pack(">I", len(c.encode())) + c.encode() for c in contexts)
            data = counted + struct.pack(">I", len(contexts)) + queries
            for kind, reply in self._option(p.OPT_SET_META_CONTEXT, data, "meta contexts"):
                if kind == p.REP_META_CONTEXT and len(reply) >= 4:
                    (number,) = struct.unpack_from(">I", reply)
                    self._context_ids[bytes(reply[4:]).decode("utf-8", "replace")] = number
            lacking = [c for c in contexts if c not in self._context_ids]
            if lacking:
                raise UnknownThing(f"{self._what} has no meta context {', '.join(lacking)}")
        for kind, reply in self._option(p.OPT_GO, counted + struct.pack(">H", 0), "the export"):
            if kind == p.REP_INFO and len(reply) == 12 and reply[:2] == b"\0\0":
                (self.size,) = struct.unpack_from(">Q", reply, 2)
        if self.size <= 0:
            raise Corrupt(f"{self._what} did not tell its size")

    def _option(self, option: int, data: bytes, what: str) -> list[tuple[int, bytearray]]:
        self._send(struct.pack(">QII", p.IHAVEOPT, option, len(data)) + data)
        replies: list[tuple[int, bytearray]] = []
        while True:
            magic, answered, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != p.OPTION_REPLY or answered != option or length > p.MAX_OPTION:
                raise Corrupt(f"{self._what} answered nonsense when asked for {what}")
            reply = self._receive(length)
            if kind == p.REP_ACK:
                return replies
            if kind & p.REP_ERR:
                text = reply.decode("utf-8", "replace")[:200]
                if kind == p.REP_ERR_UNKNOWN:
                    raise UnknownThing(f"{self._what} does not exist ({text})")
                raise GuestError(f"{self._what} refused {what} (error {kind & 0x7FFFFFFF}: {text})")
            replies.append((kind, reply))
            if len(replies) > 64:
                raise Corrupt(f"{self._what} does not stop answering when asked for {what}")

    # -- requests

    def _request(self, command: int, offset: int, length: int) -> int:
        handle = self._next_handle
        self._next_handle += 1
        self._send(p.REQUEST.pack(p.REQUEST_MAGIC, 0, command, handle, offset, length))
        return handle

    def extents(self, context: str, start: int = 0, end: int | None = None) -> list[Extent]:
        """The disk from `start` to `end` (default: all of it) as extents of `context`, in order and without gaps;
        equal neighbours are joined."""
        number = self._context_ids.get(context)
        if number is None:
            raise UnknownThing(f"{self._what} was not opened with the meta context {context}")
        found: list[Extent] = []
        offset = start
        stop = self.size if end is None else min(end, self.size)
        while offset < stop:
            span = min(stop - offset, STATUS_SPAN)
            handle = self._request(p.CMD_BLOCK_STATUS, offset, span)
            answered = self._status(handle, number)
            if not answered:
                raise Corrupt(f"{self._what} told no extent of {context} at {offset}")
            for length, flags in answered:
                # The last extent may reach past what was asked.
                length = min(length, stop - offset)
                if length <= 0:
                    break
                if found and found[-1].flags == flags:
                    found[-1] = Extent(found[-1].offset, found[-1].length + length, flags)
                else:
                    found.append(Extent(offset, length, flags))
                offset += length
        return found

    def _status(self, handle: int, context: int) -> list[tuple[int, int]]:
        extents: list[tuple[int, int]] = []
        while True:
            kind, done, answered, length = self._head()
            if answered != handle or length > MAX_REPLY:
                raise Corrupt(f"{self._what} answered a request that was not made")
            body = self._receive(length)
            if kind == p.CHUNK_BLOCK_STATUS:
                if length < 12 or (length - 4) % 8:
                    raise Corrupt(f"{self._what} sent a block status of {length} bytes")
                if struct.unpack_from(">I", body)[0] == context:
                    extents = [(size, flags) for size, flags in struct.iter_unpack(">II", body[4:])]
                    if any(size == 0 for size, _ in extents):
                        raise Corrupt(f"{self._what} sent an extent without length")
            elif kind & p.CHUNK_ERROR_BIT:
                self._raise(body, "block status")
            if done:
                return extents

    def _head(self) -> tuple[int, bool, int, int]:
        """Kind, whether it is the last, handle and body length of the next structured reply."""
        (magic,) = struct.unpack(">I", self._receive(4))
        if magic == p.SIMPLE_REPLY:
            error, _handle = struct.unpack(">IQ", self._receive(12))
            raise GuestError(f"{self._what} answered with error {error}")
        if magic != p.STRUCTURED_REPLY:
            raise Corrupt(f"{self._what} sent a reply with magic {magic:#x}")
        flags, kind, handle, length = struct.unpack(">HHQI", self._receive(16))
        return kind, bool(flags & p.CHUNK_DONE), handle, length

    def _raise(self, body: bytearray, what: str) -> None:
        error = struct.unpack_from(">I", body)[0] if len(body) >= 4 else 0
        text = body[6:].decode("utf-8", "replace")[:200]
        raise GuestError(f"{self._what} failed a {what} with error {error} {text}".rstrip())

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`; fewer at the end of the disk."""
        for _offset, data in self.read_many([offset], length):
            return bytes(data)
        raise AssertionError("unreachable")

    def read_many(self, offsets: Iterable[int], length: int) -> Iterator[tuple[int, bytearray]]:
        """(offset, data) for each offset, in that order, with several requests under way; short at the disk's end.

        An iterator that is not run to its end leaves replies in the connection: close the reader then.
        """
        todo = iter(offsets)
        order: deque[int] = deque()
        waiting: dict[int, _Pending] = {}
        complete: set[int] = set()
        exhausted = False
        while True:
            while not exhausted and len(order) < DEPTH:
                offset = next(todo, None)
                if offset is None:
                    exhausted = True
                    break
                if not 0 <= offset < self.size:
                    raise ValueError(f"offset {offset} lies outside of {self._what} ({self.size} bytes)")
                pending = _Pending(offset, min(length, self.size - offset))
                handle = self._request(p.CMD_READ, offset, len(pending.buffer))
                order.append(handle)
                waiting[handle] = pending
            if not order:
                return
            while order[0] not in complete:
                self._read_reply(waiting, complete)
            handle = order.popleft()
            complete.discard(handle)
            pending = waiting.pop(handle)
            yield pending.offset, pending.buffer

    def _read_reply(self, waiting: dict[int, _Pending], complete: set[int]) -> None:
        kind, done, handle, length = self._head()
        if handle not in waiting or handle in complete or length > MAX_REPLY:
            raise Corrupt(f"{self._what} answered a request that was not made")
        pending = waiting[handle]
        if kind == p.CHUNK_OFFSET_DATA and length >= 8:
            (offset,) = struct.unpack(">Q", self._receive(8))
            part = pending.part(offset, length - 8)
            if part is None:
                raise Corrupt(f"{self._what} sent data that was not asked for")
            self._receive_into(part)
        elif kind == p.CHUNK_OFFSET_HOLE and length == 12:
            offset, count = struct.unpack(">QI", self._receive(12))
            # Nothing to write: the buffer is zero from the start.
            if pending.part(offset, count) is None:
                raise Corrupt(f"{self._what} sent a hole that was not asked for")
        else:
            body = self._receive(length)
            if kind & p.CHUNK_ERROR_BIT:
                self._raise(body, "read")
        if done:
            if pending.filled != len(pending.buffer):
                raise Corrupt(f"{self._what} sent {pending.filled} bytes of {len(pending.buffer)}")
            complete.add(handle)

    def close(self) -> None:
        """Say goodbye and close; never raises."""
        try:
            self._socket.sendall(p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_DISC, 0, 0, 0))
        except OSError:
            pass
        self._socket.close()

    def __enter__(self) -> NbdReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
