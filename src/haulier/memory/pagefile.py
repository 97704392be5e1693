"""Pages in a shared file: a mirror's own, or that of a stopped guest's RAM.

New pages are written, not stored through the mapping: a full disk is then an error and not a SIGBUS.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier import holes
from haulier.errors import NoRoom
from haulier.memory import sparse
from haulier.units import PAGE

_WORTH: Final = 16
"""Pages from which on a run that becomes zero is made a hole: fewer are written over."""


def punch(fd: int, offset: int, length: int) -> bool:
    """Makes that part of the file a hole; False where the file system cannot."""
    return holes.punch(fd, offset, length) == 0


class PageFile:
    """`pages` pages from `offset` on, in an open file that is long enough; owns the descriptor. One thread at a time.

    `held` (bool, one a page): the page lies in the file. All others are holes, which read as zeros.
    """

    def __init__(self, fd: int, pages: int, name: str, offset: int = 0) -> None:
        """`name` says in errors what the file is of."""
        self.pages = pages
        self.held = np.zeros(pages, np.bool_)
        self._fd, self._offset, self._name = fd, offset, name
        self._order = np.zeros(pages, np.uint32)
        self._map = mmap.mmap(fd, offset + pages * PAGE, mmap.MAP_SHARED)
        self.view: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8, offset=offset).reshape(-1, PAGE)
        """All pages where they lie, u8 (pages, 4096): to be read only, and before `close`."""

    def write(self, data: bytes | memoryview, page: int) -> None:
        """Bytes from that page on; `held` is the caller's to set. NoRoom if the disk is full."""
        self.pwrite(data, self._offset + page * PAGE)

    def pwrite(self, data: bytes | memoryview, at: int, fd: int = -1) -> None:
        """Bytes at that place of the file, or of another that is to take its place. NoRoom if the disk is full."""
        rest = memoryview(data).cast("B")
        try:
            while len(rest):
                done = os.pwrite(self._fd if fd < 0 else fd, rest, at)
                rest, at = rest[done:], at + done
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise NoRoom(f"no room for {self._name}: {error.strerror}") from error
            raise

    def set(self, numbers: NDArray[np.int64], pages: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        """Store `rows` of `pages`, u8 (n, 4096), as these pages; no number twice. NoRoom if the disk is full."""
        if not len(rows):
            return
        new = ~self.held[numbers]
        # One store for each stretch that is consecutive in both places, and all there or all new.
        cut = (numbers[1:] - numbers[:-1] != 1) | (rows[1:] - rows[:-1] != 1) | (new[1:] != new[:-1])
        starts = [0, *(cut.nonzero()[0] + 1).tolist()]
        pieces = zip(starts, [*starts[1:], len(rows)], numbers[starts].tolist(), rows[starts].tolist(), strict=True)
        for start, end, page, row in pieces:
            count = end - start
            if new[start]:
                self.write(pages[row : row + count].data, page)
            else:
                self.view[page : page + count] = pages[row : row + count]
        self.held[numbers] = True

    def clear(self, numbers: NDArray[np.int64]) -> None:
        """Make pages zero; long ascending runs give their memory back."""
        there = numbers[self.held[numbers]]
        for position, count in sparse.runs(there):
            page = int(there[position])
            if count < _WORTH or not punch(self._fd, self._offset + page * PAGE, count * PAGE):
                self.view[page : page + count] = 0
            self.held[page : page + count] = False

    def forget(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Give the memory of these pages, ascending, back; False (one a page) where the file system cannot."""
        for position, count in sparse.runs(numbers):
            page = int(numbers[position])
            if punch(self._fd, self._offset + page * PAGE, count * PAGE):
                self.held[page : page + count] = False
        return ~self.held[numbers]

    def truncate(self, size: int) -> None:
        """Cut the file off there, in bytes; no page may lie behind."""
        os.ftruncate(self._fd, size)

    def last(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """True where a number occurs for the last time in `numbers`."""
        count = np.arange(len(numbers), dtype=np.uint32)
        self._order[numbers] = count
        last: NDArray[np.bool_] = self._order[numbers] == count
        return last

    def close(self) -> None:
        """Let go of the file; it stays."""
        if self._fd < 0:
            return
        self.view = np.zeros((0, PAGE), np.uint8)
        try:
            self._map.close()
        except BufferError:
            pass
        os.close(self._fd)
        self._fd = -1
