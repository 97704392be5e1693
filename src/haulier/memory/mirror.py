"""A Mirror: guest memory as defined by the stream so far, kept alike at both sites.

It starts as the base (blocks matched by idstr and length; others are zero) and changes only by what the peers tell one
another. Pages have one index over all blocks, in stream order. The file is sparse: it holds only what differs from the
base, of that the pages that were set long ago compressed (`pack`), until `complete` makes it a picture of its own.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier.errors import UsageError
from haulier.memory import sparse
from haulier.memory.base import MemoryBase
from haulier.memory.mirrorfile import PART, encode_header
from haulier.memory.packing import FRAME, PackedPages
from haulier.memory.pagefile import PageFile
from haulier.units import MIB, PAGE

_COPY: Final = 4 * MIB // PAGE
PLAIN_SHARE: Final = 16
"""One in so many pages of memory lies uncompressed in its own place: those that were set last."""
LEAST_PLAIN: Final = 4 * MIB // PAGE


def _new(path: Path | None) -> int:
    if path is None:
        return os.memfd_create("haulier-mirror", os.MFD_CLOEXEC)
    path.unlink(missing_ok=True)
    path.with_name(path.name + ".digest").unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


class Mirror:
    """Pages by global index. `blocks` and `first` map idstr to length in bytes and to the index of its first page.

    `present` (bool, one a page) is False for pages that are known to be zero. `get` may be called from another thread.
    """

    def __init__(self, path: Path | None, blocks: dict[str, int]) -> None:
        """Use Mirror.create."""
        self.blocks = dict(blocks)
        self.first: dict[str, int] = {}
        self.pages = 0
        for name, length in blocks.items():
            self.first[name] = self.pages
            self.pages += length // PAGE
        self.names = list(blocks)
        self.starts = np.array(list(self.first.values()), np.int64)
        self.present = np.zeros(self.pages, np.bool_)
        self._lent: list[tuple[int, NDArray[np.uint8]]] = []
        self._set_at = np.zeros(self.pages, np.uint32)
        self._count = 0
        self._old: deque[tuple[int, NDArray[np.int64]]] = deque()
        """Pages in the order in which they were set, by the number of that; what was set again since is here twice."""
        self._waiting = 0
        self.most_plain = max(LEAST_PLAIN, self.pages // PLAIN_SHARE)
        self._head, header = encode_header(blocks)
        self._offset, self._size = header.data_offset, header.size
        fd = _new(path)
        try:
            os.ftruncate(fd, header.size)
            name = f"the mirror of guest memory {path or 'of a sample'}"
            # Pages that lie in their place; others that are present are packed, or still lie in the base.
            self._file = PageFile(fd, self.pages, name, header.data_offset)
        except BaseException:
            os.close(fd)
            raise
        try:
            # Should this process be killed, the file says what it is (`salvage`).
            self._file.pwrite(encode_header(blocks, PART)[0], 0)
        except BaseException:
            self._file.close()
            raise
        self._lock = threading.RLock()
        self._packed = PackedPages(fd, self._size, self.pages, self._file.pwrite)
        self._whole = False
        self._packs = True

    @classmethod
    def create(
        cls, path: Path | None, blocks: dict[str, int], base: MemoryBase | None = None, *, packs: bool = True
    ) -> Mirror:
        """A new mirror in the file `path` (replaced if there), of these blocks, as they are in `base`.

        Without a path it is in memory, and goes with this process however that ends. The base must stay open as long
        as the mirror is. NoRoom if there is no room for the file. `packs`: False where `view` must not take long.
        """
        if not blocks:
            raise UsageError("a mirror needs at least one RAM block")
        mirror = cls(path, blocks)
        mirror._packs = packs
        for name, length in blocks.items():
            if base is not None and base.blocks.get(name) == length:
                first = mirror.first[name]
                for page, count in base.nonzero_runs(name):
                    mirror.present[first + page : first + page + count] = True
                mirror._lent.append((first, base.view(name)))
        return mirror

    def complete(self, into: Path | None = None) -> None:
        """Makes the file a picture that needs no base. Until then it has no header, and nothing takes it for one.

        `into`: a new file becomes the picture, and the mirror's own takes no more room for it.
        """
        if into is not None:
            self._copy(into)
            return
        self._take_over()
        self._file.truncate(self._size)
        self._file.pwrite(self._head, 0)

    def _copy(self, into: Path) -> None:
        fd = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, self._size)
            there = np.flatnonzero(self.present)
            buffer = np.empty((_COPY, PAGE), np.uint8)
            for at in range(0, len(there), _COPY):
                gidx = there[at : at + _COPY]
                pages = self.get(gidx, buffer[: len(gidx)])
                for position, count in sparse.runs(gidx):
                    offset = self._offset + int(gidx[position]) * PAGE
                    self._file.pwrite(pages[position : position + count].data, offset, fd)
            self._file.pwrite(self._head, 0, fd)
        finally:
            os.close(fd)

    def _take_over(self) -> None:
        """From now on every page lies in its place in the file."""
        self._whole = True
        self._old.clear()
        packed = self._packed.all
        for at in range(0, len(packed), 32 * FRAME):
            some = packed[at : at + 32 * FRAME]
            self._store(some, self.get(some), np.arange(len(some)))
            self._packed.drop(some)
        for first, view in self._lent:
            span = slice(first, first + len(view))
            borrowed = np.flatnonzero(self.present[span] & ~self._file.held[span])
            for position, count in sparse.runs(borrowed):
                page = int(borrowed[position])
                for start in range(page, page + count, _COPY):
                    end = min(start + _COPY, page + count)
                    self._file.write(view[start:end].data, first + start)
                self._file.held[first + page : first + page + count] = True
        self._lent.clear()

    def get(self, gidx: NDArray[np.int64], out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Copies of the pages, u8 (n, 4096), in `out` if given (contiguous, n rows)."""
        if out is None:
            out = np.empty((len(gidx), PAGE), np.uint8)
        with self._lock:
            return self._get(gidx, out)

    def _get(self, gidx: NDArray[np.int64], out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        own = self._file.held[gidx]
        if own.all():
            # mode="clip" lets numpy write straight into `out`; the line above has refused what is out of range.
            return np.take(self._file.view, gidx, axis=0, out=out, mode="clip")
        here = self.present[gidx]
        out[~here] = 0
        if own.any():
            out[own] = self._file.view[gidx[own]]
        packed = self._packed.holds(gidx)
        if packed.any():
            self._packed.read(gidx[packed], out, packed.nonzero()[0])
        borrowed = here & ~own & ~packed
        for first, view in self._lent:
            inside = borrowed & (gidx >= first) & (gidx < first + len(view))
            if inside.all():
                return np.take(view, gidx - first, axis=0, out=out, mode="clip")
            out[inside] = view[gidx[inside] - first]
        return out

    @property
    def view(self) -> NDArray[np.uint8]:
        """All pages where they lie, u8 (pages, 4096): to be read only, and before `close`. NoRoom as `complete`."""
        if not self._whole:
            self._take_over()
        return self._file.view

    def set(self, gidx: NDArray[np.int64], pages: NDArray[np.uint8], rows: NDArray[np.int64] | None = None) -> None:
        """Store pages (`rows` of `pages`, u8 (n, 4096), all by default); no index twice. NoRoom if the disk is full."""
        if rows is None:
            rows = np.arange(len(gidx))
        if not len(rows):
            return
        with self._lock:
            self._store(gidx, pages, rows)
            if self._packs and not self._whole:
                self._packed.drop(gidx)
                self._count = (self._count + 1) & 0xFFFFFFFF
                self._set_at[gidx] = self._count
                self._old.append((self._count, gidx.copy()))
                self._waiting += len(gidx)

    def _store(self, gidx: NDArray[np.int64], pages: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        self._file.set(gidx, pages, rows)
        self.present[gidx] = True

    def pack(self, most: int = 4 * FRAME) -> bool:
        """Compresses about `most` pages of those that were set longest ago, if more than enough lie there as they are.

        For moments in which there is nothing else to do. False if nothing was to be compressed.
        """
        with self._lock:
            left = most
            while self._waiting > self.most_plain and left > 0 and not self._whole:
                left -= FRAME
                self._pack_some()
            return left < most

    def _pack_some(self) -> None:
        found: list[NDArray[np.int64]] = []
        while self._old and sum(map(len, found)) < FRAME:
            count, gidx = self._old.popleft()
            self._waiting -= len(gidx)
            # Others were set again since, or became zero.
            found.append(gidx[(self._set_at[gidx] == count) & self._file.held[gidx]])
        pages = np.concatenate(found)
        for at in range(0, len(pages), FRAME):
            some = np.sort(pages[at : at + FRAME])
            if self._packed.add(some, self._file.view[some]):
                # Where a file system has no holes they stay: what is not its own's is taken to be zero.
                self._packed.drop(some[~self._file.forget(some)])

    def zero(self, gidx: NDArray[np.int64]) -> None:
        """Make pages zero; long runs give their memory back."""
        with self._lock:
            self._packed.drop(gidx)
            self._file.clear(gidx)
            self.present[gidx] = False

    def last(self, gidx: NDArray[np.int64]) -> NDArray[np.bool_]:
        """True where an index occurs for the last time in `gidx`."""
        return self._file.last(gidx)

    def close(self) -> None:
        """Let go of the file; it stays, for MemoryBase.from_mirror if it was completed."""
        self._file.close()
