"""The network block device protocol, as bytes in and bytes out. No socket, thread or clock.

Only what an export of a fixed, read-only disk to QEMU (or qemu-img, nbdinfo, the kernel) needs: the fixed newstyle
handshake, simple and structured replies, and the meta context ``base:allocation``. The words and numbers are those of
the protocol's own specification (doc/proto.md of the NBD project).

    S: NBDMAGIC IHAVEOPT flags
    C: client flags
    C: IHAVEOPT option length data     ->  S: reply magic, option, type, length, data     (any number of times)
    C: NBD_OPT_GO                      ->  transmission: requests of 28 bytes, replies in any order

`ServerCore` is one connection. `receive` takes whatever bytes came and returns requests; what is to be sent back at
once gathers in `take_output`. Replies to requests are made by functions that return buffers to be sent as one piece.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from haulier.errors import Corrupt
from haulier.units import CHUNK

NBDMAGIC: Final = b"NBDMAGIC"
IHAVEOPT: Final = 0x49484156454F5054
OPTION_REPLY: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY: Final = 0x67446698
STRUCTURED_REPLY: Final = 0x668E33EF

FLAG_FIXED_NEWSTYLE: Final = 1
FLAG_NO_ZEROES: Final = 2

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_INFO, OPT_GO = 1, 2, 3, 6, 7
OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT = 8, 9, 10

REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
REP_ERR: Final = 1 << 31
REP_ERR_UNSUP, REP_ERR_INVALID, REP_ERR_UNKNOWN = REP_ERR + 1, REP_ERR + 3, REP_ERR + 6

INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3

HAS_FLAGS, READ_ONLY, CAN_MULTI_CONN, SEND_CACHE = 1 << 0, 1 << 1, 1 << 8, 1 << 10
EXPORT_FLAGS: Final = HAS_FLAGS | READ_ONLY | CAN_MULTI_CONN | SEND_CACHE

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_CACHE, CMD_BLOCK_STATUS = 0, 1, 2, 3, 5, 7
CMD_FLAG_REQ_ONE: Final = 1 << 3

CHUNK_DONE: Final = 1
CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE, CHUNK_BLOCK_STATUS = 0, 1, 2, 5
CHUNK_ERROR_BIT: Final = 1 << 15
CHUNK_ERROR: Final = CHUNK_ERROR_BIT + 1

STATE_HOLE, STATE_ZERO = 1, 2
ALLOCATION: Final = "base:allocation"
ALLOCATION_ID: Final = 1

EPERM, EIO, EINVAL, EOVERFLOW = 1, 5, 22, 75

MAX_REQUEST: Final = 32 << 20
"""Longest read that we serve: what every client may use without asking (specification, "Size constraints")."""
MAX_OPTION: Final = 64 << 10
"""Longest option: names are at most 4096 bytes, and nobody asks for more than a handful of contexts."""
MAX_EXTENTS: Final = 8192

Buffer = bytes | bytearray | memoryview

REQUEST: Final = struct.Struct(">IHHQQI")
SIMPLE: Final = struct.Struct(">IIQ")
STRUCTURED: Final = struct.Struct(">IHHQI")
_OFFSET_DATA: Final = struct.Struct(">IHHQIQ")
_OFFSET_HOLE: Final = struct.Struct(">IHHQIQI")
_OPTION: Final = struct.Struct(">QII")
_OPTION_REPLY: Final = struct.Struct(">QIII")


class Request(NamedTuple):
    """One request in the transmission phase; offset and length (bytes) lie within the export."""

    command: int
    flags: int
    handle: int
    offset: int
    length: int


class ServerCore:
    """The server's side of one connection.

    `size_of` gives the size in bytes of an export by name, or None for a name that is not served. The size is asked
    once, when the client chooses the export: it never changes under an open connection.
    """

    def __init__(self, size_of: Callable[[str], int | None], names: Sequence[str] = ()) -> None:
        self._size_of = size_of
        self._names = tuple(names)
        self._buffer = bytearray()
        self._skip = 0
        self._client_flags: int | None = None
        self._out: list[Buffer] = [NBDMAGIC + struct.pack(">QH", IHAVEOPT, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)]
        self._allocation = False
        self.structured = False
        """The client asked for structured replies."""
        self.export: str | None = None
        """Name of the chosen export, from the transmission phase on."""
        self.size = 0
        self.closed = False
        """The connection is over; send what `take_output` still gives, then close."""

    def take_output(self) -> list[Buffer]:
        """Buffers to send now, in order; empties them."""
        out, self._out = self._out, []
        return out

    def receive(self, data: Buffer) -> list[Request]:
        """Requests completed by `data`. Corrupt when the client does not speak the protocol: drop the connection."""
        if self.closed:
            return []
        buffer = self._buffer
        buffer += data
        requests: list[Request] = []
        at = 0
        while not self.closed:
            if self.export is not None:
                if self._skip:
                    taken = min(self._skip, len(buffer) - at)
                    at += taken
                    self._skip -= taken
                    if self._skip:
                        break
                if len(buffer) - at < REQUEST.size:
                    break
                magic, flags, command, handle, offset, length = REQUEST.unpack_from(buffer, at)
                at += REQUEST.size
                if magic != REQUEST_MAGIC:
                    raise Corrupt(f"NBD client of {self.export!r} sent a request with magic {magic:#x}: not NBD")
                request = Request(command, flags, handle, offset, length)
                if self._checked(request):
                    requests.append(request)
            elif self._client_flags is None:
                if len(buffer) - at < 4:
                    break
                (self._client_flags,) = struct.unpack_from(">I", buffer, at)
                at += 4
            else:
                if len(buffer) - at < _OPTION.size:
                    break
                magic, option, length = _OPTION.unpack_from(buffer, at)
                if magic != IHAVEOPT:
                    raise Corrupt(f"NBD client sent an option with magic {magic:#x}: not NBD")
                if length > MAX_OPTION:
                    raise Corrupt(f"NBD client sent an option of {length} bytes; at most {MAX_OPTION} are taken")
                if len(buffer) - at < _OPTION.size + length:
                    break
                at += _OPTION.size
                self._option(option, bytes(buffer[at : at + length]))
                at += length
        del buffer[:at]
        return requests

    def _checked(self, request: Request) -> bool:
        """Answer at once what needs no disk; True for a request that the caller must answer."""
        command = request.command
        if command == CMD_DISC:
            self.closed = True
            return False
        if command == CMD_FLUSH:
            self._out += self.reply_done(request)
            return False
        if command == CMD_WRITE:
            # The payload follows and must be swallowed, or the stream is out of step.
            if request.length > MAX_REQUEST:
                raise Corrupt(f"NBD client wants to write {request.length} bytes to a read-only export")
            self._skip = request.length
            self._out += self.reply_error(request, EPERM)
            return False
        if command not in (CMD_READ, CMD_CACHE, CMD_BLOCK_STATUS):
            self._out += self.reply_error(request, EINVAL)
            return False
        too_long = command != CMD_BLOCK_STATUS and request.length > MAX_REQUEST
        if request.length == 0 or too_long or request.offset + request.length > self.size:
            self._out += self.reply_error(request, EOVERFLOW if too_long else EINVAL)
            return False
        if command == CMD_BLOCK_STATUS and not self._allocation:
            self._out += self.reply_error(request, EINVAL)
            return False
        return True

    # -- the handshake

    def _option(self, option: int, data: bytes) -> None:
        if option == OPT_EXPORT_NAME:
            size = self._size_of(_text(data))
            if size is None:
                # This option has no error reply; the specification says to close.
                self.closed = True
                return
            padding = b"" if self._client_flags and self._client_flags & FLAG_NO_ZEROES else bytes(124)
            self._out.append(struct.pack(">QH", size, EXPORT_FLAGS) + padding)
            self.export, self.size = _text(data), size
        elif option == OPT_ABORT:
            self._reply(option, REP_ACK)
            self.closed = True
        elif option == OPT_LIST:
            for name in self._names:
                raw = name.encode()
                self._reply(option, REP_SERVER, struct.pack(">I", len(raw)) + raw)
            self._reply(option, REP_ACK)
        elif option in (OPT_INFO, OPT_GO):
            self._go(option, data)
        elif option == OPT_STRUCTURED_REPLY:
            if data:
                self._reply(option, REP_ERR_INVALID)
            else:
                self.structured = True
                self._reply(option, REP_ACK)
        elif option in (OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT):
            self._contexts(option, data)
        else:
            self._reply(option, REP_ERR_UNSUP)

    def _go(self, option: int, data: bytes) -> None:
        cursor = _Cursor(data)
        try:
            name = _text(cursor.counted())
        except Corrupt:
            self._reply(option, REP_ERR_INVALID)
            return
        size = self._size_of(name)
        if size is None:
            self._reply(option, REP_ERR_UNKNOWN, b"no such export")
            return
        self._reply(option, REP_INFO, struct.pack(">HQH", INFO_EXPORT, size, EXPORT_FLAGS))
        self._reply(option, REP_INFO, struct.pack(">HIII", INFO_BLOCK_SIZE, 1, CHUNK, MAX_REQUEST))
        self._reply(option, REP_ACK)
        if option == OPT_GO:
            self.export, self.size = name, size

    def _contexts(self, option: int, data: bytes) -> None:
        cursor = _Cursor(data)
        try:
            name = _text(cursor.counted())
            queries = [cursor.counted() for _ in range(cursor.number())]
        except Corrupt:
            self._reply(option, REP_ERR_INVALID)
            return
        if option == OPT_SET_META_CONTEXT and not self.structured:
            self._reply(option, REP_ERR_INVALID, b"structured replies come first")
            return
        if self._size_of(name) is None:
            self._reply(option, REP_ERR_UNKNOWN, b"no such export")
            return
        listing = option == OPT_LIST_META_CONTEXT
        wanted = ALLOCATION.encode() in queries or (listing and (not queries or b"base:" in queries))
        if wanted:
            self._reply(option, REP_META_CONTEXT, struct.pack(">I", ALLOCATION_ID) + ALLOCATION.encode())
        if not listing:
            self._allocation = wanted
        self._reply(option, REP_ACK)

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._out.append(_OPTION_REPLY.pack(OPTION_REPLY, option, kind, len(data)) + data)

    # -- replies

    def reply_read(self, request: Request, pieces: Sequence[tuple[int, Buffer | None]]) -> list[Buffer]:
        """The answer to a read: `pieces` are (length, data) in order and cover it; data None is a hole."""
        if not self.structured:
            out: list[Buffer] = [SIMPLE.pack(SIMPLE_REPLY, 0, request.handle)]
            out += [bytes(length) if data is None else data for length, data in pieces]
            return out
        out = []
        offset, last, handle = request.offset, len(pieces) - 1, request.handle
        for n, (length, data) in enumerate(pieces):
            done = CHUNK_DONE if n == last else 0
            if data is None:
                out.append(_OFFSET_HOLE.pack(STRUCTURED_REPLY, done, CHUNK_OFFSET_HOLE, handle, 12, offset, length))
            else:
                out.append(_OFFSET_DATA.pack(STRUCTURED_REPLY, done, CHUNK_OFFSET_DATA, handle, 8 + length, offset))
                out.append(data)
            offset += length
        return out

    def reply_status(self, request: Request, extents: Iterable[tuple[int, int]]) -> list[Buffer]:
        """The answer to a block status: (length, flags) in order from the request's offset on."""
        body = struct.pack(">I", ALLOCATION_ID) + b"".join(struct.pack(">II", *extent) for extent in extents)
        head = STRUCTURED.pack(STRUCTURED_REPLY, CHUNK_DONE, CHUNK_BLOCK_STATUS, request.handle, len(body))
        return [head + body]

    def reply_done(self, request: Request) -> list[Buffer]:
        """Success, without data."""
        return [SIMPLE.pack(SIMPLE_REPLY, 0, request.handle)]

    def reply_error(self, request: Request, error: int) -> list[Buffer]:
        """Failure with one of the protocol's error numbers."""
        if not self.structured or request.command not in (CMD_READ, CMD_BLOCK_STATUS):
            return [SIMPLE.pack(SIMPLE_REPLY, error, request.handle)]
        head = STRUCTURED.pack(STRUCTURED_REPLY, CHUNK_DONE, CHUNK_ERROR, request.handle, 6)
        return [head + struct.pack(">IH", error, 0)]


class _Cursor:
    """Reads counted strings out of an option's data; Corrupt when they are longer than it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self) -> int:
        if self._at + 4 > len(self._data):
            raise Corrupt("NBD option ends within a number")
        (value,) = struct.unpack_from(">I", self._data, self._at)
        self._at += 4
        return int(value)

    def counted(self) -> bytes:
        length = self.number()
        if self._at + length > len(self._data):
            raise Corrupt("NBD option ends within a name")
        raw = self._data[self._at : self._at + length]
        self._at += length
        return raw


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
