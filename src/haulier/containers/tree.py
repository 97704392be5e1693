"""Trees of files as regions of chunks: the format, and where in a region a file's blocks lie. No I/O.

A region is a stretch of whole chunks: a layer of an image, or what a container wrote on top. Its first block is the
header; it says where the table is, and the table has an entry for every file, directory, link and device. Contents lie
at blocks of 4 KiB, so that trees of one distribution, and disks of VMs, have blocks in common; a file of a chunk or
more begins at a chunk, so that it is the same chunks wherever it occurs. docs/formats/trees.md has it byte by byte.

Tables come from other sites and from images: `Tree.decode` believes nothing.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from blake3 import blake3

from haulier.errors import UNDECODABLE, Corrupt, NoRoom
from haulier.units import BLOCK, BLOCKS_PER_CHUNK, CHUNK

MAGIC: Final = b"HTREE\0\0\1"
_HEAD: Final = struct.Struct("<8sQI4x32s")
_EXTENT: Final = struct.Struct("<II")
MAX_TABLE: Final = 256 << 20
MAX_ENTRIES: Final = 4_000_000
MAX_EXTENTS: Final = (BLOCK - _HEAD.size) // _EXTENT.size
OPAQUE: Final = b"trusted.overlay.opaque"
KEPT_XATTRS: Final = (b"user.", b"security.capability", OPAQUE, b"trusted.overlay.redirect")
"""What else the overlay file system notes names inodes of the host it was written on."""


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One name in a tree. `mode` is all of st_mode; `extents` are pairs (first block, blocks) in the region, flat."""

    path: bytes
    """Relative, without "." and ".."; the tree's root is empty."""
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int = 0
    extents: tuple[int, ...] = ()
    target: bytes = b""
    """Of a symbolic link; or, of a hard link, the path of the first name of the file."""
    rdev: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    hard: bool = False

    @property
    def pairs(self) -> Iterator[tuple[int, int]]:
        return zip(self.extents[::2], self.extents[1::2], strict=True)


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(list[Entry])
_KINDS: Final = (stat.S_ISREG, stat.S_ISDIR, stat.S_ISLNK, stat.S_ISCHR, stat.S_ISBLK, stat.S_ISFIFO, stat.S_ISSOCK)
ReadBlocks = Callable[[int, int], bytes]
"""(first block, blocks) of a region to its bytes."""


@dataclass(frozen=True)
class Tree:
    """A table: entries in order of path, parents before what is in them."""

    entries: tuple[Entry, ...]

    def encode(self) -> bytes:
        return _ENCODER.encode(self.entries)

    @classmethod
    def decode(cls, data: bytes, blocks: int) -> Tree:
        """Checks every entry; `blocks` is the size of the region. Raises Corrupt."""
        try:
            entries = _DECODER.decode(data)
        except UNDECODABLE as error:
            raise Corrupt(f"a tree's table makes no sense ({error}): ask for it again") from None
        if len(entries) > MAX_ENTRIES:
            raise Corrupt(f"a tree of {len(entries)} names: at most {MAX_ENTRIES} are taken")
        seen: dict[bytes, Entry] = {}
        for entry in entries:
            problem = _wrong(entry, seen, blocks)
            if problem:
                raise Corrupt(f"a tree names {entry.path[:80]!r}, {problem}: ask for it again")
            seen[entry.path] = entry
        return cls(tuple(entries))

    @classmethod
    def read(cls, read: ReadBlocks, blocks: int) -> Tree:
        """The tree of a region of `blocks` blocks; an empty one for a region that was never written."""
        head = read(0, 1)
        if not any(head):
            return cls(())
        magic, length, count, digest = _HEAD.unpack_from(head)
        if magic != MAGIC or length > MAX_TABLE or count > MAX_EXTENTS:
            raise Corrupt("a region of files has a header that makes no sense: ask for it again")
        parts: list[bytes] = []
        left = -(-length // BLOCK)
        for number in range(count):
            first, many = _EXTENT.unpack_from(head, _HEAD.size + number * _EXTENT.size)
            left -= many
            if not 0 < many <= blocks or first + many > blocks or left < 0:
                raise Corrupt("a tree's table lies outside its region: ask for it again")
            parts.append(read(first, many))
        data = b"".join(parts)[:length]
        if len(data) != length or blake3(data).digest() != digest:
            raise Corrupt("a tree's table does not match its digest: ask for it again")
        return cls.decode(data, blocks)

    def header(self, table: bytes, extents: Sequence[tuple[int, int]]) -> bytes:
        """The first block of the region whose table is `table`, at `extents`."""
        if len(extents) > MAX_EXTENTS:
            raise NoRoom("a tree's table is in too many pieces: give the container a larger disk")
        head = _HEAD.pack(MAGIC, len(table), len(extents), blake3(table).digest())
        head += b"".join(_EXTENT.pack(*extent) for extent in extents)
        return head.ljust(BLOCK, b"\0")


def _wrong(entry: Entry, seen: dict[bytes, Entry], blocks: int) -> str:
    """What is wrong with an entry; "" if nothing is."""
    path = entry.path
    if not any(kind(entry.mode) for kind in _KINDS) or not 0 <= entry.mode < 1 << 16:
        return "of no known kind"
    if path:
        parent, _, name = path.rpartition(b"/")
        above = seen.get(parent)
        if name in (b"", b".", b"..") or b"\0" in path or len(path) > 4096:
            return "which is no path"
        if above is None or not stat.S_ISDIR(above.mode):
            return "which is in no directory"
    elif seen or not stat.S_ISDIR(entry.mode):
        return "which is no root"
    if path in seen:
        return "twice"
    if not 0 <= entry.uid < 1 << 32 or not 0 <= entry.gid < 1 << 32 or abs(entry.mtime_ns) >= 1 << 63:
        return "with numbers out of bounds"
    if (
        b"\0" in entry.target
        or len(entry.target) > 4096
        or stat.S_ISLNK(entry.mode) != (bool(entry.target) and not entry.hard)
    ):
        return "a link to nowhere"
    if any(not name.startswith(KEPT_XATTRS) or b"\0" in name or len(value) > 65536 for name, value in entry.xattrs):
        return "with attributes that are not taken"
    if entry.hard:
        first = seen.get(entry.target)
        return "" if first is not None and not stat.S_ISDIR(first.mode) and not entry.extents else "a link to nothing"
    return _wrong_contents(entry, blocks)


def _wrong_contents(entry: Entry, blocks: int) -> str:
    if len(entry.extents) % 2 or len(entry.xattrs) > 64:
        return "with half an extent"
    total = 0
    for first, many in entry.pairs:
        if first < 1 or many < 1 or first + many > blocks:
            return "whose contents lie outside the region"
        total += many
    if entry.size < 0 or total != (-(-entry.size // BLOCK) if stat.S_ISREG(entry.mode) else 0):
        return f"of {entry.size} bytes in {total} blocks"
    return ""


class Space:
    """Which blocks of a region are free. Block 0 is the header's."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free: list[tuple[int, int]] = [(1, blocks - 1)] if blocks > 1 else []

    def take(self, extents: Sequence[tuple[int, int]]) -> None:
        """Marks extents as used, which must be free."""
        for first, many in sorted(extents):
            for position, (start, count) in enumerate(self._free):
                if start <= first and first + many <= start + count:
                    rest = [(start, first - start), (first + many, start + count - first - many)]
                    self._free[position : position + 1] = [piece for piece in rest if piece[1]]
                    break
            else:
                raise Corrupt("two files of a tree have a block in common: ask for it again")

    def give(self, extents: Sequence[tuple[int, int]]) -> None:
        """Blocks that are free again."""
        merged: list[tuple[int, int]] = []
        for start, count in sorted([*self._free, *extents]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + count)
            else:
                merged.append((start, count))
        self._free = merged

    def find(self, many: int) -> list[tuple[int, int]]:
        """Blocks for a file: at a chunk when it fills one, in one piece where possible. NoRoom when it is full."""
        if many <= 0:
            return []
        step = BLOCKS_PER_CHUNK if many >= BLOCKS_PER_CHUNK else 1
        for start, count in self._free:
            first = -(-start // step) * step
            if first + many <= start + count:
                found = [(first, many)]
                self.take(found)
                return found
        if sum(count for _, count in self._free) < many:
            raise NoRoom(f"the files do not fit into {self.blocks * BLOCK >> 20} MiB: give the container a larger disk")
        pieces: list[tuple[int, int]] = []
        for start, count in sorted(self._free, key=lambda piece: -piece[1]):
            pieces.append((start, min(count, many)))
            many -= pieces[-1][1]
            if not many:
                break
        self.take(pieces)
        return pieces


def sequential(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    """Where files of these sizes (bytes) go in a fresh layer, in order, and the next free block. (0, 0): no contents.

    Small files follow one another; each large one begins at a chunk.
    """
    at, large_at = 1, 0
    small: list[tuple[int, int]] = []
    for size in sizes:
        many = -(-size // BLOCK)
        small.append((at, many) if 0 < many < BLOCKS_PER_CHUNK else (0, 0))
        at += many if many < BLOCKS_PER_CHUNK else 0
    large_at = -(-at // BLOCKS_PER_CHUNK) * BLOCKS_PER_CHUNK
    found = []
    for size, place in zip(sizes, small, strict=True):
        many = -(-size // BLOCK)
        if many >= BLOCKS_PER_CHUNK:
            place = (large_at, many)
            large_at = -(-(large_at + many) // BLOCKS_PER_CHUNK) * BLOCKS_PER_CHUNK
        found.append(place)
    return found, large_at


def chunks_for(blocks: int) -> int:
    return -(-blocks // BLOCKS_PER_CHUNK)


def chunk_range(first: int, many: int) -> range:
    """The chunks of a region that blocks lie in."""
    return range(first // BLOCKS_PER_CHUNK, -(-(first + many) // BLOCKS_PER_CHUNK))


assert CHUNK == BLOCK * BLOCKS_PER_CHUNK
