"""Pages straight into the RAM file of a target's QEMU that waits for its stream, which then need not carry them.

QEMU takes its stream on one thread, record by record through a buffer; where its RAM is a shared file, another process
can put the pages there faster, and what QEMU is given holds no record of that RAM at all. Only for pre-copy: with
post-copy allowed QEMU drops its RAM first and keeps account of every page that its stream brought.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from haulier.errors import Corrupt
from haulier.memory import sparse
from haulier.memory.pagefile import PageFile
from haulier.memory.pages import Decoded
from haulier.units import PAGE


class GuestRam:
    """The RAM file of one block of a guest that has not run yet. One thread at a time.

    `loaded` (bool, one a page): the stream has brought the page, and the mirror has the same.
    """

    def __init__(self, path: Path, block: str) -> None:
        """`block`: its idstr. The file must be QEMU's already. Corrupt if it is not made of whole pages."""
        self.block = block
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.bytes = os.fstat(fd).st_size
            if not self.bytes or self.bytes % PAGE:
                raise Corrupt(f"{path} has {self.bytes} bytes, not a whole number of pages: no memory of a guest")
            self._file = PageFile(fd, self.bytes // PAGE, f"the memory of the guest, {path}")
        except BaseException:
            os.close(fd)
            raise
        # Machines put firmware into their RAM as they start.
        self._file.held = sparse.held(fd, 0, self._file.pages)
        self.loaded = np.zeros(self._file.pages, np.bool_)

    def load(self, batch: Decoded, first: int) -> None:
        """Bring the pages of a batch that lie in this block, whose first page has the index `first`.

        Batches come in the order of the stream. NoRoom if there is no memory for them.
        """
        rows = np.flatnonzero((batch.gidx >= first) & (batch.gidx < first + self._file.pages))
        numbers = batch.gidx[rows] - first
        last = self._file.last(numbers)
        rows, numbers = rows[last], numbers[last]
        paged = batch.paged[rows]
        self._file.clear(numbers[~paged])
        at = (np.cumsum(batch.paged) - 1)[rows[paged]]
        numbers, known = numbers[paged], self.loaded[numbers[paged]]
        changed = batch.changed[at] | ~known
        self._file.set(numbers[changed], batch.pages, at[changed])
        self.loaded[batch.gidx[rows] - first] = True

    def overtake(self, batch: Decoded, first: int) -> None:
        """The mirror now has these pages ahead of the stream, as a guess: here they stay what the stream made them."""
        numbers = batch.gidx - first
        self.loaded[numbers[(numbers >= 0) & (numbers < len(self.loaded))]] = False

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
