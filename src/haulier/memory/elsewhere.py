"""Pages of a base found by content at any address: worth it only where the base is a snapshot of another boot.

Within one boot (a clone and its golden snapshot) the comparison at the same address finds them all.
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

from haulier.errors import Corrupt
from haulier.memory.base import MemoryBase
from haulier.units import PAGE


def page_hashes(pages: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """xxh3-64 of each page, u8 (n, 4096) contiguous."""
    data = pages.data.cast("B")
    digest = xxhash.xxh3_64_intdigest
    return np.array([digest(data[at : at + PAGE]) for at in range(0, len(data), PAGE)], np.uint64)


class BasePages:
    """Both a BlockFinder and a BlockReader over a base. A page's id is its index over all blocks, sorted by idstr."""

    def __init__(self, base: MemoryBase) -> None:
        self._views = [base.view(name) for name in sorted(base.blocks)]
        counts = [len(view) for view in self._views]
        self._starts = np.cumsum([0, *counts])
        self._base = base
        self._hashes: NDArray[np.uint64] | None = None
        self._ids = np.zeros(0, np.uint32)

    def read(self, ids: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """The pages, u8 (n, 4096); Corrupt for an index beyond the base."""
        out = np.empty((len(ids), PAGE), np.uint8)
        if len(ids) and int(ids.max()) >= int(self._starts[-1]):
            raise Corrupt(f"page {int(ids.max())} lies beyond the base's {int(self._starts[-1])} pages")
        which = np.searchsorted(self._starts, ids, side="right") - 1
        for block in np.unique(which).tolist():
            rows = which == block
            out[rows] = self._views[block][ids[rows] - self._starts[block]]
        return out

    def find(self, pages: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Ids (n) of equal pages of the base (bytes compared), -1 for none. The first call hashes the base."""
        hashes = self._hashes if self._hashes is not None else self._index()
        wanted = page_hashes(pages)
        found = np.full(len(pages), -1, np.int64)
        if not len(hashes):
            return found
        at = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
        rows = np.flatnonzero(hashes[at] == wanted)
        ids = self._ids[at[rows]]
        equal = (self.read(ids) == pages[rows]).all(axis=1)
        found[rows[equal]] = ids[equal]
        return found

    def _index(self) -> NDArray[np.uint64]:
        hashes, ids = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint32)]
        for name, start in zip(sorted(self._base.blocks), self._starts.tolist(), strict=False):
            view = self._base.view(name)
            for page, count in self._base.nonzero_runs(name):
                hashes.append(page_hashes(view[page : page + count]))
                ids.append(np.arange(start + page, start + page + count, dtype=np.uint32))
        everything = np.concatenate(hashes)
        order = np.argsort(everything, kind="stable")
        self._ids = np.concatenate(ids)[order]
        self._hashes = everything[order]
        return self._hashes
