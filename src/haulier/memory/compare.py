"""Compare two files of guest memory page by page: the proof that a handoff moved memory unharmed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier.errors import UsageError
from haulier.memory import sparse
from haulier.units import MIB, PAGE

_WINDOW: Final = 4 * MIB


@dataclass(frozen=True, slots=True)
class CompareReport:
    """`pages` in each file; `differing`: the indexes of those that are not alike, ascending."""

    pages: int
    differing: list[int]

    @property
    def equal(self) -> bool:
        return not self.differing


def compare_ram(path_a: Path | str, path_b: Path | str) -> CompareReport:
    """Compare two RAM files of equal length (a multiple of 4096). Holes count as zero and are not read.

    UsageError if the lengths differ. The files should not change meanwhile: stop the guests.
    """
    with open(path_a, "rb", buffering=0) as a, open(path_b, "rb", buffering=0) as b:
        size = os.fstat(a.fileno()).st_size
        if size != os.fstat(b.fileno()).st_size or size % PAGE:
            raise UsageError(f"{path_a} and {path_b} are not RAM files of one length")
        differing: list[int] = []
        left, right = np.empty((_WINDOW // PAGE, PAGE), np.uint8), np.empty((_WINDOW // PAGE, PAGE), np.uint8)
        for start, end in _windows(a.fileno(), b.fileno(), size):
            count = (end - start) // PAGE
            one, two = _read(a.fileno(), start, left[:count]), _read(b.fileno(), start, right[:count])
            rows = np.flatnonzero((one.view(np.uint64) != two.view(np.uint64)).any(axis=1))
            differing += (rows + start // PAGE).tolist()
        return CompareReport(size // PAGE, differing)


def _windows(a: int, b: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole pages, at most a window long, that cover all that is data in either file, each page once."""
    extents = sorted([*sparse.data_extents(a, 0, size), *sparse.data_extents(b, 0, size)])
    done = 0
    for start, end in extents:
        at = max(done, start // PAGE * PAGE)
        end = min(-(-end // PAGE) * PAGE, size)
        while at < end:
            yield at, min(at + _WINDOW, end)
            at = min(at + _WINDOW, end)
        done = max(done, end)


def _read(fd: int, offset: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
    view = out.data.cast("B")
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if not count:
            raise UsageError("a RAM file became shorter while it was compared; stop the guests first")
        done += count
    return out
