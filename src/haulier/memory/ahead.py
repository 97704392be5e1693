"""Pages of a running guest read ahead of QEMU's stream, so that the link has work while QEMU's pass runs over the rest.

What is read here is only a guess at what the stream will hold: it goes into both mirrors, and the stream, which comes
later and alone decides, then finds most pages equal to the mirror. So a page torn by a write, or dirtied since, costs
bytes and never correctness.

Only regions are read of which a sample says that they will cost the link something, most expensive first. What costs
only CPU is left to QEMU's pass, which gets on with it while the link is busy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier.errors import UsageError
from haulier.memory import sparse
from haulier.memory.mirror import Mirror
from haulier.memory.pages import BlockFinder
from haulier.units import MIB, PAGE

REGION: Final = 2 * MIB // PAGE
"""Pages that are read in one go, and sampled as one."""
SAMPLE: Final = 8
"""Pages of each region that tell whether it is worth being early."""


class AheadReader:
    """Reads the RAM file of one block, which a running QEMU shares. One thread at a time.

    `take` gives each page at most once; `done` when there is nothing more to give.
    """

    def __init__(self, path: Path, block: str) -> None:
        """UsageError if the file is not made of whole pages; OSError if it cannot be read."""
        self.block = block
        self.done = False
        self.read_pages = 0
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(self._fd).st_size
        if size % PAGE:
            os.close(self._fd)
            self._fd = -1
            raise UsageError(f"{path} has {size} bytes, not a whole number of pages")
        self.pages = size // PAGE
        self._order: list[int] | None = None
        self._buffer = np.empty((REGION, PAGE), np.uint8)

    @property
    def regions_left(self) -> int:
        """Regions of the order that were not taken yet."""
        return len(self._order or ())

    @property
    def planned(self) -> bool:
        """The order is decided."""
        return self._order is not None

    def close(self) -> None:
        """Let go of the file."""
        self.done = True
        # The number first: closed twice it might be another file's.
        number, self._fd = self._fd, -1
        if number >= 0:
            os.close(number)

    def plan(self, mirror: Mirror, finder: BlockFinder | None) -> None:
        """Samples every region that holds data, and decides the order."""
        first = mirror.first[self.block]
        starts = sorted({page // REGION * REGION for page in self._data_regions()})
        found: list[NDArray[np.int64]] = []
        copies: list[NDArray[np.uint8]] = []
        step = max(1, REGION // SAMPLE)
        for start in starts:
            at = np.arange(start + step // 2, min(start + REGION, self.pages), step)
            pages = self._read_some(at)
            wanted = self.wanted(mirror, first + at, pages)
            found.append(at[wanted])
            copies.append(pages[wanted])
        weights = dict.fromkeys(starts, 0)
        if found and sum(map(len, found)):
            at, pages = np.concatenate(found), np.ascontiguousarray(np.concatenate(copies))
            literal = np.ones(len(at), np.bool_) if finder is None else finder.find(pages) < 0
            for region in (at[literal] // REGION * REGION).tolist():
                weights[region] += 1
        # Taken from the end: heaviest first, and by address among equals, as QEMU reads them.
        self._order = sorted((start for start in starts if weights[start]), key=lambda start: (weights[start], -start))

    def plan_all(self) -> None:
        """Every region that holds data, by address: for a whole pass without a stream behind it."""
        self._order = sorted({page // REGION * REGION for page in self._data_regions()}, reverse=True)

    def take(self, mirror: Mirror, most: int = 64) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """The next region's pages that are neither zero nor as in `mirror`: numbers in the block (n), copies (n, 4096).

        Reads on through at most `most` regions until there is one with such pages; call `plan` first.
        """
        if self._order is None:
            raise UsageError("plan the reader before taking from it")
        first = mirror.first[self.block]
        for _ in range(most):
            if not self._order:
                break
            start = self._order.pop()
            count = min(REGION, self.pages - start)
            pages = self._buffer[:count]
            self.read(pages, start)
            at = np.arange(start, start + count)
            rows = self.wanted(mirror, first + at, pages)
            if len(rows):
                self.read_pages += len(rows)
                return at[rows], pages[rows]
        self.done = not self._order
        return np.zeros(0, np.int64), np.zeros((0, PAGE), np.uint8)

    def _data_regions(self) -> list[int]:
        """The first page of each region in which the file has data; holes are zero and never read."""
        regions: list[int] = []
        for begin, end in sparse.data_extents(self._fd, 0, self.pages * PAGE):
            regions += range(begin // PAGE // REGION * REGION, -(-end // PAGE), REGION)
        return regions

    def wanted(self, mirror: Mirror, gidx: NDArray[np.int64], pages: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Rows of the pages that the other site does not have."""
        wanted = sparse.nonzero(pages)
        known = np.flatnonzero(mirror.present[gidx] & wanted)
        if len(known):
            old = mirror.get(gidx[known])
            wanted[known] = (pages[known].view(np.uint64) != old.view(np.uint64)).any(axis=1)
        return np.flatnonzero(wanted)

    def places(self, run: int) -> list[int]:
        """The first page of each run of `run` pages in which the file has data."""
        found: dict[int, None] = {}
        for begin, end in sparse.data_extents(self._fd, 0, self.pages * PAGE):
            found.update(dict.fromkeys(range(begin // PAGE // run * run, -(-end // PAGE), run)))
        return list(found)

    def read(self, out: NDArray[np.uint8], page: int) -> None:
        """Fills `out`, u8 (n, 4096), with the pages from `page` on. UsageError if the file has become shorter."""
        view = out.data.cast("B")
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], page * PAGE + done)
            if not count:
                raise UsageError("the guest's RAM file became shorter while it was read: is its QEMU gone?")
            done += count

    def _read_some(self, at: NDArray[np.int64]) -> NDArray[np.uint8]:
        out = np.empty((len(at), PAGE), np.uint8)
        for row, page in enumerate(at.tolist()):
            self.read(out[row : row + 1], page)
        return out
