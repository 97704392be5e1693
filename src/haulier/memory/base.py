"""A MemoryBase: an immutable picture of a guest's memory that both sites hold, block by block.

It is read where it lies: in the mapped-ram file that QEMU wrote of a stopped guest (a golden snapshot), or in the file
that a Mirror left behind (the way back). Blocks are matched by idstr and length, never by position: a hot-plugged NIC
adds a block in the middle. Two sites compare `digest` before they rely on a base.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from haulier.errors import Corrupt, UnknownThing, Unsupported
from haulier.memory import format as q
from haulier.memory import sparse
from haulier.memory.mirrorfile import read_header
from haulier.units import MIB, PAGE

_HEADER_WINDOW = 1 << 16


@dataclass(frozen=True, slots=True)
class _Area:
    offset: int
    length: int
    stale: tuple[tuple[int, int], ...] = ()


class MemoryBase:
    """Guest memory of one moment: `blocks` maps idstr to length in bytes; `view(idstr)` gives its pages.

    The file is mapped privately and must not change while the base is in use. `clear` makes pages zero here alone.
    """

    def __init__(self, path: Path, areas: dict[str, _Area]) -> None:
        """Use from_mapped_ram or from_mirror."""
        self.path = path
        self.blocks = {name: area.length for name, area in areas.items()}
        self._areas = areas
        self._digest: bytes | None = None
        self._blank = False
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(self._fd).st_size
            for name, area in areas.items():
                if area.offset % PAGE or area.offset + area.length > size:
                    raise Corrupt(f"{path} is cut short: RAM block {name!r} is not all there; make the snapshot again")
            self._map = mmap.mmap(self._fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(self._fd)
            raise
        self._views: dict[str, NDArray[np.uint8]] = {}
        for name, area in areas.items():
            view = np.frombuffer(self._map, np.uint8, area.length, area.offset).reshape(-1, PAGE)
            for first, count in area.stale:
                view[first : first + count] = 0
            view.flags.writeable = False
            self._views[name] = view

    @classmethod
    def from_mapped_ram(cls, path: Path) -> MemoryBase:
        """The memory in a file that QEMU (>= 9) wrote with `migrate file:` and the capability mapped-ram."""
        return cls(path, _mapped_ram_areas(path))

    @classmethod
    def from_mirror(cls, path: Path) -> MemoryBase:
        """The memory in a file that a Mirror left behind."""
        header = read_header(path)
        areas = {}
        offset = header.data_offset
        for name, length in header.blocks.items():
            areas[name] = _Area(offset, length)
            offset += length
        return cls(path, areas)

    def view(self, idstr: str) -> NDArray[np.uint8]:
        """The block's pages, u8 (n, 4096), read-only; UnknownThing if there is no such block."""
        try:
            return self._views[idstr]
        except KeyError:
            raise UnknownThing(f"the base {self.path} has no RAM block {idstr!r}") from None

    def clear(self, idstr: str, pages: NDArray[np.int64]) -> None:
        """From now on these pages of the block are zero, in this process and not in the file."""
        view = self.view(idstr)
        view.flags.writeable = True
        view[pages] = 0
        view.flags.writeable = False

    def clear_all(self) -> None:
        """As `clear` of all pages of all blocks, which takes no memory for them."""
        self._blank = True
        for name, length in self.blocks.items():
            view = np.zeros((length // PAGE, PAGE), np.uint8)
            view.flags.writeable = False
            self._views[name] = view

    def nonzero_runs(self, idstr: str) -> Iterator[tuple[int, int]]:
        """Maximal runs (page, count) of the block's pages that are not zero; holes of the file are never read."""
        view, area = self.view(idstr), self._areas[idstr]
        if self._blank:
            return
        open_at = open_count = 0
        last = 0
        for start, end in sparse.data_extents(self._fd, area.offset, area.offset + area.length):
            first = max((start - area.offset) // PAGE, last)
            last = -(-(end - area.offset) // PAGE)
            for page, count in sparse.nonzero_runs(view, first, last):
                if open_count and page == open_at + open_count:
                    open_count += count
                    continue
                if open_count:
                    yield open_at, open_count
                open_at, open_count = page, count
        if open_count:
            yield open_at, open_count

    @property
    def digest(self) -> bytes:
        """BLAKE3 over names, lengths and pages. Computed once and stored beside the file, where that is allowed.

        For each block by name: be32 length of name, name, be64 length; then for each maximal run of pages that are not
        zero: be64 first page, be64 count, the pages. So it does not depend on holes or on the order of blocks.
        """
        if self._digest is None:
            self._digest = self._stored_digest() or self.compute_digest()
        return self._digest

    def compute_digest(self) -> bytes:
        """`digest` of what the file holds now, whatever was stored of it; stored from now on."""
        hasher = blake3()
        for name in sorted(self.blocks):
            view = self.view(name)
            encoded = name.encode()
            hasher.update(struct.pack(">I", len(encoded)) + encoded + struct.pack(">Q", self.blocks[name]))
            for first, count in self.nonzero_runs(name):
                hasher.update(struct.pack(">QQ", first, count))
                for start in range(first, first + count, 16 * MIB // PAGE):
                    hasher.update(view[start : min(start + 16 * MIB // PAGE, first + count)].data)
        digest = hasher.digest()
        self._store_digest(digest)
        return digest

    @staticmethod
    def digest_path(path: Path) -> Path:
        """Where the digest of the base in `path` is stored."""
        return path.with_name(path.name + ".digest")

    def _stamp(self) -> dict[str, int]:
        status = os.fstat(self._fd)
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}

    def _stored_digest(self) -> bytes | None:
        try:
            stored = json.loads(self.digest_path(self.path).read_text())
            if stored.pop("digest_of") == self._stamp():
                digest = bytes.fromhex(stored["digest"])
                return digest if len(digest) == 32 else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        return None

    def _store_digest(self, digest: bytes) -> None:
        temporary = self.path.with_name(f"{self.digest_path(self.path).name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps({"digest": digest.hex(), "digest_of": self._stamp()}))
            temporary.replace(self.digest_path(self.path))
        except OSError:
            # A base on a read-only file system is hashed anew by each process: slower, not wrong.
            temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the file. Views given out stay valid until they are gone too."""
        self._views.clear()
        try:
            self._map.close()
        except BufferError:
            pass
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _mapped_ram_areas(path: Path) -> dict[str, _Area]:
    """Where the blocks lie in a mapped-ram file, and which pages have data there though its bitmap calls them zero.

    QEMU writes each page at a fixed place, and a page that became zero only loses its bit. A snapshot of a stopped
    guest has no such pages.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        start = 0

        def read(count: int, at: int) -> bytes:
            data = os.pread(fd, count, start + at) if count <= _HEADER_WINDOW else b""
            if len(data) != count:
                raise Corrupt(f"{path} ends in its header; make the snapshot again")
            return data

        magic, version = struct.unpack(">II", read(8, 0))
        if magic != q.MAGIC or version != q.VERSION:
            raise Corrupt(f"{path} is not a file that QEMU migrated to; make the snapshot again")
        start = 8
        if read(1, 0)[0] != q.CONFIGURATION:
            raise Corrupt(f"{path} has no configuration section; make the snapshot again")
        start += q.configuration(read)[1]
        capabilities: list[str] = []
        while read(1, 0)[0] == q.SUBSECTION:
            _, some, length = q.subsection(read)
            capabilities += some
            start += length
        if "mapped-ram" not in capabilities or "x-ignore-shared" in capabilities:
            raise Unsupported(f"{path} was not written with mapped-ram (QEMU >= 9); make the snapshot again")
        kind, _, name_length = struct.unpack(">BIB", read(6, 0))
        if kind != q.START or read(name_length, 6) != b"ram":
            raise Corrupt(f"{path} does not begin with memory; make the snapshot again")
        start += 6 + name_length + 8
        (head,) = struct.unpack(">Q", read(8, 0))
        if head & q.FLAGS != q.MEM_SIZE:
            raise Corrupt(f"{path} has no table of RAM blocks; make the snapshot again")
        start += 8
        left, total = head & ~q.FLAGS, 0
        areas: dict[str, _Area] = {}
        while left:
            (name_length,) = read(1, 0)
            name = q.name_of(read(name_length, 1), "RAM block")
            length, version, page_size, bitmap, pages = struct.unpack(">QIQQQ", read(36, 1 + name_length))
            total += length
            q.check_block(name, length, len(areas) + 1, total)
            left -= length
            if name in areas or left < 0:
                raise Corrupt(f"{path}: the table of RAM blocks does not add up at {name!r}; make the snapshot again")
            if version != 1 or page_size != PAGE:
                raise Unsupported(f"{path}: mapped-ram version {version} with pages of {page_size} bytes is not known")
            header_end = start + 37 + name_length
            if pages % PAGE or not header_end <= bitmap <= pages or pages + length > size:
                raise Corrupt(f"{path}: RAM block {name!r} is not all there; make the snapshot again")
            areas[name] = _Area(pages, length, _stale(fd, bitmap, pages, length))
            start = pages + length
        return areas
    finally:
        os.close(fd)


def _stale(fd: int, bitmap: int, pages: int, length: int) -> tuple[tuple[int, int], ...]:
    """Runs of pages with data in the file but without their bit in the bitmap."""
    count = length // PAGE
    raw = os.pread(fd, -(-count // 8), bitmap)
    if bitmap + len(raw) > pages or len(raw) != -(-count // 8):
        raise Corrupt("the bitmap of a mapped-ram file is cut short; make the snapshot again")
    written = np.unpackbits(np.frombuffer(raw, np.uint8), count=count, bitorder="little").astype(np.bool_)
    stale = np.zeros(count, np.bool_)
    for start, end in sparse.data_extents(fd, pages, pages + length):
        stale[(start - pages) // PAGE : -(-(end - pages) // PAGE)] = True
    found = np.flatnonzero(stale & ~written)
    return tuple((int(found[position]), run) for position, run in sparse.runs(found))
