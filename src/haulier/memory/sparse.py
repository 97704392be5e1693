"""Helpers for sparse files of pages: where the data is, which pages are not zero."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier.units import MIB, PAGE

WORDS: Final = PAGE // 8
_WINDOW: Final = MIB // PAGE


def data_extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges (offset, end) of the file within start..end that are not holes; all of it where holes are not known."""
    at = start
    while at < end:
        try:
            first = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            yield at, end
            return
        if first >= end:
            return
        at = min(os.lseek(fd, first, os.SEEK_HOLE), end)
        yield first, at


def held(fd: int, offset: int, pages: int) -> NDArray[np.bool_]:
    """Which of so many pages of the file from `offset` on are not holes."""
    found = np.zeros(pages, np.bool_)
    for start, end in data_extents(fd, offset, offset + pages * PAGE):
        found[(start - offset) // PAGE : -(-(end - offset) // PAGE)] = True
    return found


def nonzero(pages: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """For each of the pages (n, 4096), contiguous: is it anything but zero?"""
    words = pages.view(np.uint64)
    if not len(words):
        return np.zeros(0, np.bool_)
    # Most pages tell by their first words; only those that do not are read whole.
    found: NDArray[np.bool_] = np.asarray(words[:, ::64].any(axis=1))
    rest = np.flatnonzero(~found)
    if len(rest):
        found[rest] = np.bitwise_or.reduce(words[rest], axis=1) != 0
    return found


def runs(indexes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(position, count) of the stretches of ascending `indexes` in which each is one more than the one before."""
    if not len(indexes):
        return
    start = 0
    for cut in ((indexes[1:] - indexes[:-1] != 1).nonzero()[0] + 1).tolist():
        yield start, cut - start
        start = cut
    yield start, len(indexes) - start


def nonzero_runs(view: NDArray[np.uint8], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Maximal runs (page, count) of pages that are not zero among first..last of `view`, read in windows."""
    open_at = open_count = 0
    for start in range(first, last, _WINDOW):
        found = np.flatnonzero(nonzero(view[start : min(start + _WINDOW, last)])) + start
        for position, count in runs(found):
            page = int(found[position])
            if open_count and page == open_at + open_count:
                open_count += count
                continue
            if open_count:
                yield open_at, open_count
            open_at, open_count = page, count
    if open_count:
        yield open_at, open_count
