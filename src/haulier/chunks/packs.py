"""Pack files: the records in them, reading, appending, walking, and giving space back. docs/formats/packs.md.

A pack only ever grows at its end, up to its *tail*: the length that the index has committed. What lies beyond the
tail was never acknowledged and may be torn. Whoever appends to, truncates or removes a pack holds its flock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

from haulier import holes
from haulier.chunks.fingerprint import Buffer, fingerprint
from haulier.compress import zstd
from haulier.durable import sync
from haulier.errors import Corrupt, HaulierError, NoRoom
from haulier.units import CHUNK

RAW: Final = 0
ZSTD: Final = 1
ALIGN: Final = 64
"""Records start at multiples of this, so that a walker finds the next one after a hole or damage."""
HEADER: Final = 64
"""Bytes of a pack's header, and of a record's."""

_PACK: Final = struct.Struct("<8sII16s24xQ")  # magic, version, id, store, check
_RECORD: Final = struct.Struct("<4sBBHII32sQQ")  # magic, version, codec, 0, stored, 0, fingerprint, 0, check
_PACK_MAGIC: Final = b"HAULPACK"
_RECORD_MAGIC: Final = b"HREC"
_VERSION: Final = 1
_WINDOW: Final = 1 << 20
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FAILING: Final = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN})
"""What the disk, or a file system with checksums, says of what it cannot read."""


class Location(NamedTuple):
    """Where a chunk's record is: pack, offset of its header, stored bytes after the header, codec."""

    pack: int
    offset: int
    stored: int
    codec: int

    @property
    def end(self) -> int:
        """Where the next record starts."""
        return self.offset + extent(self.stored)


def extent(stored: int) -> int:
    """Bytes of pack that a record of `stored` payload bytes takes, padding included."""
    return HEADER + -(-stored // ALIGN) * ALIGN


def disk_error(error: OSError, path: Path) -> HaulierError:
    """NoRoom for a full disk, Corrupt for a failing one."""
    if error.errno in _FULL:
        return NoRoom(
            f"no room left for the chunk store at {path}; free some space or run haulier gc --all, then try again"
        )
    return Corrupt(f"the disk under {path} failed: {error.strerror}; check it, then run haulier doctor")


def encode_record(fp: bytes, data: Buffer, level: int | None) -> tuple[bytes, Buffer, int]:
    """(header, payload, codec) for a chunk. With a `level`, zstd is used where it saves at least an eighth."""
    payload, codec = data, RAW
    if level is not None:
        small = zstd.compress(data, level)
        if len(small) <= CHUNK - CHUNK // 8:
            payload, codec = small, ZSTD
    head = _RECORD.pack(_RECORD_MAGIC, _VERSION, codec, 0, len(payload), 0, fp, 0, 0)
    return head[:-8] + xxh3_64_intdigest(head[:-8]).to_bytes(8, "little"), payload, codec


def decode_record(fp: bytes, at: Location, record: bytes) -> bytes | None:
    """The chunk in `record`; None unless header, length, codec and fingerprint are all as they should be."""
    head = parse_record(record[:HEADER])
    if head != (fp, at.stored, at.codec) or len(record) < HEADER + at.stored:
        return None
    data = record[HEADER : HEADER + at.stored]
    if at.codec == ZSTD:
        engine = zstd.ZstdDecompressor()
        try:
            data = engine.decompress(data, CHUNK + 1)
        except zstd.ZstdError:
            return None
    return data if len(data) == CHUNK and fingerprint(data) == fp else None


def parse_record(head: bytes) -> tuple[bytes, int, int] | None:
    """(fingerprint, stored, codec) of a record's 64-byte header, or None."""
    if len(head) < HEADER or head[:4] != _RECORD_MAGIC:
        return None
    _, version, codec, _, stored, _, fp, _, check = _RECORD.unpack(head[:HEADER])
    if version != _VERSION or codec not in (RAW, ZSTD) or not 0 < stored <= CHUNK:
        return None
    return (fp, stored, codec) if check == xxh3_64_intdigest(head[: HEADER - 8]) else None


def pack_path(folder: Path, pack: int) -> Path:
    """The file of a pack."""
    return folder / f"{pack:08d}.pack"


class Pack:
    """A pack open for reading. Closed when the last reader lets go, so a removed pack stays readable until then."""

    __slots__ = ("fd", "id", "path")

    def __init__(self, folder: Path, pack: int, flags: int = os.O_RDONLY) -> None:
        self.fd = -1
        self.id = pack
        self.path = pack_path(folder, pack)
        self.fd = os.open(self.path, flags | os.O_CLOEXEC, 0o600)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def read_record(self, at: Location) -> bytes:
        """Header and payload at a location; short when the file is."""
        return os.pread(self.fd, HEADER + at.stored, at.offset)

    def size(self) -> int:
        """Bytes of the file, holes included."""
        return os.fstat(self.fd).st_size

    def allocated(self) -> int:
        """Bytes that the file takes on disk."""
        return os.fstat(self.fd).st_blocks * 512


def open_pack(folder: Path, number: int) -> Pack | None:
    """A pack, open; None when it is gone, or the disk fails twice to open it. Raises HaulierError as `read_chunk`."""
    for _ in range(2):
        try:
            return Pack(folder, number)
        except FileNotFoundError:
            break
        except OSError as error:
            _check_failing(error, pack_path(folder, number))
    return None


def read_chunk(folder: Path, fp: bytes, at: Location, pack: Pack | None = None) -> bytes | None:
    """The chunk that a record holds; None only when the record is known to be lost.

    That is: read and not that chunk, cut short, its pack gone, or the disk fails to read it twice. `pack` is tried
    first where it is open. Raises HaulierError when it could not be read for another reason (no descriptor or memory
    left, no permission): that says nothing about the record, and nobody may take it out for that.
    """
    for _ in range(2):
        try:
            pack = pack or Pack(folder, at.pack)
            return decode_record(fp, at, pack.read_record(at))
        except FileNotFoundError:
            break
        except OSError as error:
            _check_failing(error, pack_path(folder, at.pack))
            pack = None
    return None


def _check_failing(error: OSError, path: Path) -> None:
    if error.errno not in _FAILING:
        raise HaulierError(
            f"{path} cannot be read now: {error.strerror}; nothing of it is given up. Give this process what it lacks"
            " (open files, memory, permission), then try again"
        ) from error


class Writer:
    """The one appender of a pack: holds its flock. Thread safety is the caller's."""

    def __init__(self, pack: Pack, tail: int) -> None:
        self.pack = pack
        self.tail = tail
        self.committed = tail
        self.fresh = False

    @classmethod
    def create(cls, folder: Path, pack: int, store: bytes) -> Writer | None:
        """A new pack under a new id; None when the id is taken, or the file was removed before it was locked."""
        try:
            opened = Pack(folder, pack, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            if not _lock(opened):
                return None
            head = _PACK.pack(_PACK_MAGIC, _VERSION, pack, store, 0)[:-8]
            os.pwrite(opened.fd, head + xxh3_64_intdigest(head).to_bytes(8, "little"), 0)
        except FileExistsError:
            return None
        except OSError as error:
            raise disk_error(error, folder) from error
        writer = cls(opened, HEADER)
        writer.committed = 0
        writer.fresh = True
        return writer

    @classmethod
    def adopt(cls, folder: Path, pack: int) -> Writer | None:
        """An existing pack that nobody writes; None otherwise. `set_tail` must follow."""
        try:
            opened = Pack(folder, pack, os.O_RDWR)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise disk_error(error, folder) from error
        return cls(opened, 0) if _lock(opened) else None

    def set_tail(self, tail: int) -> bool:
        """Drop what lies beyond `tail`, the committed length; False when the file is shorter than that."""
        if self.pack.size() < tail or tail < HEADER:
            return False
        os.ftruncate(self.pack.fd, tail)
        self.tail = self.committed = tail
        return True

    def append(self, head: bytes, payload: Buffer, codec: int) -> Location:
        """Write a record at the end. Raises NoRoom (nothing appended) or Corrupt."""
        stored = len(payload)
        at = Location(self.pack.id, self.tail, stored, codec)
        padding = bytes(at.end - self.tail - HEADER - stored)
        try:
            written = os.pwritev(self.pack.fd, [head, payload, padding], self.tail)
            if written != at.end - self.tail:
                rest = (head + bytes(payload) + padding)[written:]
                while rest:  # the second attempt says why the first was short
                    count = os.pwrite(self.pack.fd, rest, self.tail + written)
                    written, rest = written + count, rest[count:]
        except OSError as error:
            self._shorten(self.tail)
            raise disk_error(error, self.pack.path.parent) from error
        self.tail = at.end
        return at

    def sync(self) -> None:
        """Make everything up to the tail durable."""
        os.fdatasync(self.pack.fd)
        if self.fresh:
            sync(self.pack.path.parent)
            self.fresh = False

    def forget(self) -> None:
        """Take back what was not committed."""
        self._shorten(self.committed)
        self.tail = max(self.committed, HEADER)

    def _shorten(self, length: int) -> None:
        try:
            os.ftruncate(self.pack.fd, length)
        except OSError:
            pass  # beyond the tail nothing is ever read; this only gives space back


def _lock(pack: Pack) -> bool:
    """Take the flock; False when another holds it, or the file was removed meanwhile."""
    try:
        fcntl.flock(pack.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(pack.fd).st_nlink > 0


def walk(pack: Pack, end: int) -> Iterator[tuple[bytes, Location]]:
    """Every record with a sound header before `end`, holes and damage stepped over. Payloads are not looked at."""
    at = HEADER
    while at + HEADER <= end:
        head = parse_record(os.pread(pack.fd, HEADER, at))
        if head is not None:
            fp, stored, codec = head
            location = Location(pack.id, at, stored, codec)
            if location.end <= end:
                yield fp, location
            at = location.end
        else:
            at = _next_magic(pack, at + ALIGN, end)


def _next_magic(pack: Pack, at: int, end: int) -> int:
    while at < end:
        try:
            data = os.lseek(pack.fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return end  # nothing but hole from here on
            raise
        at = max(at, data // ALIGN * ALIGN)
        window = os.pread(pack.fd, min(_WINDOW, end - at), at)
        if not window:
            return end
        found = window.find(_RECORD_MAGIC)
        while found >= 0 and found % ALIGN:
            found = window.find(_RECORD_MAGIC, found + 1)
        if found >= 0:
            return at + found
        at += len(window) // ALIGN * ALIGN or ALIGN
    return end


def punch(pack: Pack, start: int, end: int) -> None:
    """Give the space of [start, end) back to the file system; zeros are read there afterwards. Needs a writable fd.

    File systems that cannot do it are left alone: the space then returns with compaction.
    """
    try:
        if os.lseek(pack.fd, start, os.SEEK_DATA) >= end:
            return
    except OSError as error:
        if error.errno == errno.ENXIO:
            return
    number = holes.punch(pack.fd, start, end - start)
    if number not in (0, errno.EOPNOTSUPP, errno.ENOSYS):
        raise disk_error(OSError(number, os.strerror(number)), pack.path)
