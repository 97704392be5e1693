"""A disk for tests: finds blocks by plain comparison, reads them by index."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from haulier.errors import UnknownThing


class Disk:
    """A BlockFinder and BlockReader over a list of blocks; remembers what was asked."""

    def __init__(self, *blocks: bytes) -> None:
        self.blocks = list(blocks)
        self.asked = 0

    def find(self, pages: NDArray[np.uint8]) -> NDArray[np.int64]:
        self.asked += len(pages)
        assert pages.flags.c_contiguous
        rows = [page.tobytes() for page in pages]
        return np.array([self.blocks.index(row) if row in self.blocks else -1 for row in rows], np.int64)

    def read(self, ids: NDArray[np.uint32]) -> NDArray[np.uint8]:
        if len(ids) and int(ids.max()) >= len(self.blocks):
            raise UnknownThing(f"no block {int(ids.max())}")
        return np.frombuffer(b"".join(self.blocks[index] for index in ids.tolist()), np.uint8).reshape(-1, 4096)
