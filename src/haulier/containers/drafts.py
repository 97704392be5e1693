"""The files of pages of a dump, put together at the target before the dump is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier.containers.checkpoint import SEGMENT, digest_of
from haulier.memory import sparse
from haulier.units import PAGE

DRAFT_BYTES: Final = 16 << 20
"""So much more of the picture is put into the files of pages at once, as it comes."""


class Drafting:
    """When to put together what is there of the files of pages: after each stretch, and when a layout's pages are here.

    Pages and layouts come over different channels: a layout may be here long before the last of its pages.
    """

    def __init__(self) -> None:
        self._whole = -1
        """The layout that was drafted with all of its pages, and ..."""
        self._at = 0
        """... the raw bytes that were there at the last draft."""

    def due(self, stream: int, settled: bool, raw: int) -> tuple[bool, bool]:
        """(something is to be put together now, all that a settled layout needs is there).

        `stream`: from how many raw bytes on the layout holds; `settled`: it came after the first round; `raw`: bytes
        of the picture that have come.
        """
        # A settled layout of no bytes more than the one before counts, too: nothing may have changed at all.
        layout = stream + settled
        whole = raw >= stream
        if not (whole and layout > self._whole) and raw < self._at + DRAFT_BYTES:
            return False, False
        self._at = raw
        if whole:
            self._whole = max(self._whole, layout)
        return True, whole and settled


class Draft:
    """A file of pages, put together from the picture before it is known for certain which pages it will have.

    `touched`, one a page of the picture, is set for those that changed since they were taken; whoever changes the
    picture sets it after, so that a page that is taken meanwhile is taken again.
    """

    def __init__(self, path: Path, picture: NDArray[np.uint8], touched: NDArray[np.bool_]) -> None:
        self._file = path.open("x+b", buffering=0)
        self._picture, self._touched = picture, touched
        self._numbers = np.zeros(0, np.int64)
        self._digests: list[bytes] = []
        self.written = 0
        """Pages that were taken, all in all."""

    def begin(self, numbers: NDArray[np.int64]) -> None:
        """It is the file of the pages of these numbers, which are all zero as yet unless they were touched."""
        self._file.truncate(len(numbers) * PAGE)
        self._numbers = numbers
        self._digests = [b""] * -(-len(numbers) // SEGMENT)

    def follow(self, numbers: NDArray[np.int64]) -> None:
        """Makes the file that of the pages of these numbers, as they are now."""
        before = self._numbers[: len(numbers)]
        wrong = np.ones(len(numbers), np.bool_)
        wrong[: len(before)] = (numbers[: len(before)] != before) | self._touched[numbers[: len(before)]]
        rows = np.flatnonzero(wrong)
        self._touched[numbers[rows]] = False
        self.written += len(rows)
        for position, count in sparse.runs(rows):
            self._write(int(rows[position]), numbers[int(rows[position]) : int(rows[position]) + count])
        self._file.truncate(len(numbers) * PAGE)
        stale = set((rows // SEGMENT).tolist())
        if len(before) != len(self._numbers) and len(numbers) % SEGMENT:
            stale.add(len(numbers) // SEGMENT)
        segments = -(-len(numbers) // SEGMENT)
        self._digests = [*self._digests[:segments], *([b""] * (segments - len(self._digests)))]
        for segment in stale:
            self._digests[segment] = b""
        self._numbers = numbers

    def _write(self, at: int, numbers: NDArray[np.int64]) -> None:
        for position, count in sparse.runs(numbers):
            first = int(numbers[position])
            data = self._picture[first : first + count].reshape(-1).data
            place = (at + position) * PAGE
            while data:
                done = os.pwrite(self._file.fileno(), data, place)
                data, place = data[done:], place + done

    def digest(self) -> bytes:
        """What `digest_of_pages` makes of the file: of what changed since the last call it is read again."""
        for segment, digest in enumerate(self._digests):
            if not digest:
                data = os.pread(self._file.fileno(), SEGMENT * PAGE, segment * SEGMENT * PAGE)
                self._digests[segment] = digest_of(data)
        return digest_of(b"".join(self._digests))

    def close(self) -> None:
        """Lets go of the file, which stays."""
        self._file.close()
