"""QEMU's migration stream as tokens, and back: `b"".join(rebuild(t) for t in tokens)` is the stream, byte for byte.

A StreamParser takes the stream in pieces of any size and gives tokens: pages and zero pages of guest memory as arrays,
everything else verbatim. It follows pre-copy to its end, and post-copy: there the device state is a package of known
length after which pages go on. In pre-copy the device state has no length, so from its first byte on all is Raw.

What it cannot follow (vfio, huge pages, x-ignore-shared, pages on other channels) raises Unsupported, nonsense raises
Corrupt; `pending` then holds every byte not yet given out as a token, so that nothing is lost to the caller.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from haulier.errors import Corrupt, HaulierError, Unsupported
from haulier.memory import format as q
from haulier.units import PAGE

Buffer = bytes | bytearray | memoryview
MarkKind = Literal["setup", "part", "end", "device", "package"]

TOKEN: Final = 1 << 18
"""Bytes of the stream in one token at most, so that batches can be cut between tokens."""

_U64: Final = struct.Struct(">Q")
_U32: Final = struct.Struct(">I")
_PAGE_GOES_ON: Final = q.PAGE_DATA | q.CONTINUE
_ZERO_GOES_ON: Final = q.ZERO | q.CONTINUE
_PROBE: Final = 4
_FLAG_BYTES: Final = np.uint16(0xFF0F)
_BIG64: Final = np.dtype(">u8")
_LITTLE16: Final = np.dtype("<u2")
_BYTE: Final = np.dtype(np.uint8)
_ADDRESS: Final = np.uint64(0xFFFFFFFFFFFFFFFF ^ q.FLAGS)
_SECTIONS: Final[dict[int, MarkKind]] = {q.START: "setup", q.PART: "part", q.END: "end"}


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes of the stream that are not pages, verbatim."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Pages:
    """A run of page records of one block; `first`: its first record names the block.

    `addresses` are byte offsets in the block, u64 (n). `pages` is u8 (n, 4096), read-only, in general a strided view
    into the bytes that were fed.
    """

    block: str
    first: bool
    addresses: NDArray[np.uint64]
    pages: NDArray[np.uint8]

    @property
    def size(self) -> int:
        return len(self.addresses) * q.RECORD + (1 + len(self.block) if self.first else 0)


@dataclass(frozen=True, slots=True)
class Zeros:
    """A run of records of zero pages of one block; `first`: its first record names the block."""

    block: str
    first: bool
    addresses: NDArray[np.uint64]

    @property
    def size(self) -> int:
        return len(self.addresses) * q.ZERO_RECORD + (1 + len(self.block) if self.first else 0)


@dataclass(frozen=True, slots=True)
class Mark:
    """Something ended or begins here; stands for no bytes.

    "setup", "part", "end": such a section of RAM is complete ("end": the guest is stopped, these were its last dirty
    pages). "device": device state follows. "package": the package of post-copy's device state is complete.
    """

    kind: MarkKind

    @property
    def size(self) -> int:
        return 0


Token = Raw | Pages | Zeros | Mark


class _Need(Exception):
    """The buffer ends before what the parser looks at does."""


class StreamParser:
    """Bytes in, tokens out. Holds back less than 128 KiB: the beginning of something that is not complete yet.

    blocks:        idstr -> length in bytes of each RAM block, in stream order, complete once `ready`
    machine:       the machine type named by the stream
    device_state:  device state has begun: in pre-copy the guest is stopped and no page follows
    switchover:    QEMU announced the switchover (QEMU >= 9.2)
    postcopy:      post-copy was advised
    rounds:        times that the scan over memory began again, the first included
    sections:      RAM sections completed
    ids:           section ids of RAM
    packaged:      the package of post-copy's device state is complete
    """

    def __init__(
        self,
        token_bytes: int = TOKEN,
        *,
        blocks: Mapping[str, int] | None = None,
        ids: Collection[int] = (),
        bare: bool = False,
    ) -> None:
        """`token_bytes`: no token stands for more bytes of the stream than this, or one record if that is more.

        `blocks` and `ids`, as an earlier parser learned them: the stream is one of post-copy that broke and goes on.
        It has no beginning of its own, and its first record names its block. `bare`: it is the connection for urgent
        pages, which has nothing but records.
        """
        self.blocks: dict[str, int] = {}
        self.machine: str | None = None
        self.ready = False
        self.device_state = False
        self.switchover = False
        self.postcopy = False
        self.rounds = 0
        self.sections = 0
        self.error: HaulierError | None = None
        self._max_raw = max(token_bytes, 1)
        self._max_run = max(token_bytes // q.RECORD, 1)
        self._max_zeros = max(token_bytes // q.ZERO_RECORD, 1)
        self._buffer = b""
        self._at = 0
        self._raw = 0
        self._consumed = 0
        self._step: Callable[[list[Token]], None] = self._magic
        self._names: dict[int, str] = {}
        self._section = q.EOF
        self._ended = False
        self._block: str | None = None
        self._limit = 0
        self._first_page: dict[str, int] = {}
        self._position = -1
        self._sizes_left = 0
        self._sizes: dict[str, int] = {}
        self._package_left = 0
        self.packaged = False
        self._bare = bare
        if blocks is not None:
            self._name_blocks(dict(blocks))
            self._names = dict.fromkeys(ids, "ram")
            self.device_state = self.postcopy = self.packaged = True
            self._step = self._records if bare else self._top

    @property
    def ids(self) -> list[int]:
        return list(self._names)

    @property
    def pending(self) -> bytes:
        """The bytes fed that are in no token yet."""
        return self._buffer

    def feed(self, data: Buffer) -> list[Token]:
        """The tokens that `data` completes. Corrupt, Unsupported: see the module; every later call raises the same."""
        if self.error is not None:
            raise self.error
        self._buffer = self._buffer + data if self._buffer else bytes(data)
        self._at = self._raw = 0
        out: list[Token] = []
        try:
            while self._at < len(self._buffer):
                self._step(out)
        except _Need:
            pass
        except HaulierError as error:
            self.error = error
            raise
        self._cut(out, self._at)
        self._consumed += self._at
        self._buffer = self._buffer[self._at :]
        return out

    # Reading: _peek looks ahead and never moves; only _at moves, and bytes from _raw to _at become a Raw token.

    def _peek(self, size: int, at: int = 0) -> bytes:
        start = self._at + at
        if len(self._buffer) - start < size:
            raise _Need
        return self._buffer[start : start + size]

    def _cut(self, out: list[Token], end: int) -> None:
        for start in range(self._raw, end, self._max_raw):
            out.append(Raw(self._buffer[start : min(start + self._max_raw, end)]))
        self._raw = end

    def _mark(self, out: list[Token], kind: MarkKind) -> None:
        self._cut(out, self._at)
        out.append(Mark(kind))

    def _where(self) -> str:
        return f"at byte {self._consumed + self._at} of QEMU's stream"

    # Steps: each consumes something complete, or raises _Need with nothing consumed.

    def _magic(self, out: list[Token]) -> None:
        magic, version = struct.unpack(">II", self._peek(8))
        if magic != q.MAGIC:
            raise Corrupt(f"the stream does not begin like a QEMU migration ({magic:#010x}); is TLS or multifd on?")
        if version != q.VERSION:
            raise Unsupported(f"QEMU's stream has version {version}, not {q.VERSION}; use a QEMU of 8.2 to 10.x")
        self._at += 8
        self._step = self._top

    def _top(self, out: list[Token]) -> None:
        kind = self._buffer[self._at]
        if kind in (q.PART, q.END):
            (section,) = _U32.unpack(self._peek(4, 1))
            if section not in self._names:
                raise Corrupt(f"part of section {section}, which was never started, {self._where()}")
            self._at += 5
            self._section = kind
            self._step = self._records
        elif kind == q.COMMAND:
            self._command(out)
        elif kind == q.CONFIGURATION:
            self.machine, size = q.configuration(self._peek)
            self._at += size
            self._step = self._subsections
        elif kind == q.START:
            self._start()
        elif kind == q.FULL:
            if not self._ended:
                raise Unsupported("a device's state comes before the end of memory (virtio-mem?); remove that device")
            self._opaque_from_here(out)
        elif kind in (q.EOF, q.VMDESC):
            self._step = self._opaque
        else:
            raise Corrupt(f"unknown section type {kind:#04x} {self._where()}")

    def _subsections(self, out: list[Token]) -> None:
        if self._buffer[self._at] != q.SUBSECTION:
            self._step = self._top
            return
        _, capabilities, size = q.subsection(self._peek)
        for capability in ("x-ignore-shared", "mapped-ram", "multifd", "xbzrle"):
            if capability in capabilities:
                raise Unsupported(f"the migration capability {capability} is on; switch it off for a handoff")
        self._at += size

    def _start(self) -> None:
        section, size = struct.unpack(">IB", self._peek(5, 1))
        name = q.name_of(self._peek(size, 6), "section")
        _, version = struct.unpack(">II", self._peek(8, 6 + size))
        if name != "ram":
            raise Unsupported(f"the guest has live state of {name!r}, which cannot be handed over; remove that device")
        if version != q.RAM_VERSION:
            raise Unsupported(f"QEMU sends memory in version {version}, not {q.RAM_VERSION}; use a QEMU of 8.2 to 10.x")
        if len(self._names) >= 16:
            raise Corrupt(f"too many sections start {self._where()}")
        self._at += 14 + size
        self._names[section] = name
        self._section = q.START
        self._step = self._records

    def _command(self, out: list[Token]) -> None:
        command, size = struct.unpack(">HH", self._peek(4, 1))
        data = self._peek(size, 5)
        q.check_command(command, data, self.blocks, self._where())
        if command == q.POSTCOPY_ADVISE:
            self.postcopy = True
            if size and (size != 16 or _U64.unpack_from(data)[0] != PAGE or _U64.unpack_from(data, 8)[0] != PAGE):
                raise Unsupported(
                    "post-copy of a guest with huge pages cannot be handed over; use plain pages or pre-copy"
                )
        elif command == q.SWITCHOVER_START:
            self.switchover = True
        elif command == q.PACKAGED:
            (self._package_left,) = _U32.unpack(data)
            if self._package_left > q.MAX_PACKAGE:
                raise Corrupt(f"a package of {self._package_left} bytes is announced {self._where()}")
            self.device_state = True
            self._step = self._package
        self._at += 5 + size
        if command == q.PACKAGED:
            self._mark(out, "device")

    def _package(self, out: list[Token]) -> None:
        size = min(self._package_left, len(self._buffer) - self._at)
        self._at += size
        self._package_left -= size
        if not self._package_left:
            self.packaged = True
            self._mark(out, "package")
            self._step = self._top

    def _opaque_from_here(self, out: list[Token]) -> None:
        self.device_state = True
        self._mark(out, "device")
        self._step = self._opaque

    def _opaque(self, out: list[Token]) -> None:
        self._at = len(self._buffer)

    def _footer(self, out: list[Token]) -> None:
        # Footers are optional (migration.send-section-footer), so only the next byte tells.
        if self._buffer[self._at] == q.FOOTER:
            self._peek(5)
            self._at += 5
        self._step = self._top

    def _records(self, out: list[Token]) -> None:
        """RAM records up to the end of the section."""
        buffer, end = self._buffer, len(self._buffer)
        while True:
            if end - self._at < 8:
                raise _Need
            (head,) = _U64.unpack_from(buffer, self._at)
            flags = head & q.FLAGS
            if flags == _PAGE_GOES_ON:
                self._pages(out, self._at, False)
            elif flags == _ZERO_GOES_ON:
                self._zeros(out, self._at, False)
            elif flags in (q.PAGE_DATA, q.ZERO):
                self._named(out, flags)
            elif flags == q.EOS:
                self._at += 8
                self.sections += 1
                if self._bare:
                    continue
                self._ended = self._ended or self._section == q.END
                self._mark(out, _SECTIONS[self._section])
                self._step = self._footer
                return
            elif flags == q.MEM_SIZE:
                self._at += 8
                self._sizes_left, self._sizes = head & ~q.FLAGS, {}
                self._step = self._block_sizes
                return
            else:
                self._refuse(flags)

    def _refuse(self, flags: int) -> None:
        for flag, capability in (
            (q.XBZRLE, "xbzrle"),
            (q.COMPRESSED, "compress"),
            (q.MULTIFD_FLUSH, "multifd"),
            (q.HOOK, "rdma"),
        ):
            if flags & ~q.CONTINUE == flag:
                raise Unsupported(f"the migration capability {capability} is on; switch it off for a handoff")
        raise Corrupt(f"a memory record with flags {flags:#x} {self._where()}")

    def _block_sizes(self, out: list[Token]) -> None:
        while self._sizes_left:
            (size,) = self._peek(1)
            name = q.name_of(self._peek(size, 1), "RAM block")
            (length,) = _U64.unpack(self._peek(8, 1 + size))
            self._sizes_left -= length
            q.check_block(name, length, len(self._sizes) + 1, length + sum(self._sizes.values()))
            if name in self._sizes or self._sizes_left < 0:
                raise Corrupt(f"the table of RAM blocks does not add up at {name!r} {self._where()}")
            self._sizes[name] = length
            self._at += 9 + size
        if self.ready and self._sizes != self.blocks:
            raise Unsupported(
                "the guest's memory changed its layout during the handoff; try again without hot-plugging"
            )
        if not self.ready:
            self._name_blocks(self._sizes)
        self._step = self._records

    def _name_blocks(self, sizes: dict[str, int]) -> None:
        self.blocks, self.ready = sizes, True
        page = 0
        for name, length in sizes.items():
            self._first_page[name] = page
            page += length // PAGE

    def _named(self, out: list[Token], flags: int) -> None:
        (size,) = self._peek(1, 8)
        name = q.name_of(self._peek(size, 9), "RAM block")
        if name not in self.blocks:
            raise Corrupt(f"pages of RAM block {name!r}, which is not in the table, {self._where()}")
        self._peek(PAGE if flags == q.PAGE_DATA else 1, 9 + size)
        self._block, self._limit = name, self.blocks[name]
        # A record that names its block looks, from 8 bytes before its page on, like one that does not, but for
        # those 8 bytes: so the run begins there, and its first header is put right from the real one.
        if flags == q.PAGE_DATA:
            self._pages(out, self._at + 1 + size, True)
        else:
            self._zeros(out, self._at + 1 + size, True)

    def _run(self, start: int, stride: int, flags: int, limit: int) -> int:
        """How many complete records with these flags follow one another from `start`; the first is taken as given."""
        buffer = self._buffer
        fit = min((len(buffer) - start) // stride, limit)
        count = 1
        at = start + stride
        for count in range(1, min(fit, _PROBE)):
            if buffer[at + 7] != flags or buffer[at + 6] & 0x0F:
                return count
            at += stride
        if fit <= _PROBE:
            return fit
        # The two bytes that hold the flags, read little-endian as they are: swapping them all would cost more.
        low = np.ndarray((fit - _PROBE,), _LITTLE16, buffer, start + _PROBE * stride + 6, (stride,))
        other = (low & _FLAG_BYTES) != flags << 8
        end = int(other.argmax())
        return _PROBE + (end if other[end] else fit - _PROBE)

    def _addresses(self, start: int, stride: int, count: int, first: bool) -> NDArray[np.uint64]:
        if self._block is None:
            raise Corrupt(f"pages before any RAM block was named {self._where()}")
        heads = np.ndarray((count,), _BIG64, self._buffer, start, (stride,)).astype(np.uint64)
        (head,) = _U64.unpack_from(self._buffer, self._at)
        if first:
            heads[0] = head
        heads &= _ADDRESS
        if (highest := int(np.maximum.reduce(heads))) >= self._limit:
            raise Corrupt(f"a page at {highest:#x}, beyond the end of RAM block {self._block!r}, {self._where()}")
        position = self._first_page[self._block] + head // PAGE
        if not self.device_state and (position < self._position or not self.rounds):
            self.rounds += 1
        self._position = position
        return heads

    def _pages(self, out: list[Token], start: int, first: bool) -> None:
        count = self._run(start, q.RECORD, _PAGE_GOES_ON, self._max_run)
        if count < 1:
            raise _Need
        addresses = self._addresses(start, q.RECORD, count, first)
        pages = np.ndarray((count, PAGE), _BYTE, self._buffer, start + 8, (q.RECORD, 1))
        self._cut(out, self._at)
        assert self._block is not None
        out.append(Pages(self._block, first, addresses, pages))
        self._at = self._raw = start + count * q.RECORD

    def _zeros(self, out: list[Token], start: int, first: bool) -> None:
        count = self._run(start, q.ZERO_RECORD, _ZERO_GOES_ON, self._max_zeros)
        if count < 1:
            raise _Need
        addresses = self._addresses(start, q.ZERO_RECORD, count, first)
        if np.ndarray((count,), np.uint8, self._buffer, start + 8, (q.ZERO_RECORD,)).any():
            raise Unsupported(f"a page filled with something other than zero {self._where()}")
        self._cut(out, self._at)
        assert self._block is not None
        out.append(Zeros(self._block, first, addresses))
        self._at = self._raw = start + count * q.ZERO_RECORD


def rebuild(token: Token) -> bytes:
    """The bytes of the stream that the token stands for."""
    return rebuild_all([token])


def rebuild_all(tokens: Sequence[Token]) -> bytes:
    """The bytes of the stream that the tokens stand for, one after another."""
    out = bytearray(sum(token.size for token in tokens))
    at = 0
    for token in tokens:
        if isinstance(token, Raw):
            out[at : at + token.size] = token.data
        elif isinstance(token, Pages):
            start = _write_heads(out, at, token, q.PAGE_DATA, q.RECORD)
            np.ndarray((len(token.pages), PAGE), np.uint8, out, start + 8, (q.RECORD, 1))[:] = token.pages
        elif isinstance(token, Zeros):
            _write_heads(out, at, token, q.ZERO, q.ZERO_RECORD)
        at += token.size
    return bytes(out)


def _write_heads(out: bytearray, at: int, token: Pages | Zeros, flag: int, stride: int) -> int:
    """Write the headers of a run of records at `at`; where the (virtual) header of its first page or fill byte is."""
    start = at + (1 + len(token.block) if token.first else 0)
    heads = np.ndarray((len(token.addresses),), _BIG64, out, start, (stride,))
    heads[:] = token.addresses | np.uint64(flag | q.CONTINUE)
    if token.first:
        name = token.block.encode()
        out[at : at + 9 + len(name)] = _U64.pack(int(token.addresses[0]) | flag) + bytes([len(name)]) + name
    return start
