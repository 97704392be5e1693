"""Pages of a mirror that are seldom looked at, compressed, behind the place of its last page in the same file.

A record, each at a multiple of 4096 from there on:

    8 bytes  "HAULPACK"
    be32     number of pages, 1 to 32
    be32     length of the data
    8 bytes  xxh3-64 of all that follows
    le32     each page's index over all blocks
    le32     for every four pages, the length of their zstd frame
    data     the frames: four pages each, one after the other

A record of which no page counts any more becomes a hole. Of two records with one page the later one counts, and what
lies in the page's own place counts before both. The numbers stand so that the file of a dead process can be read.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from haulier.compress import zstd
from haulier.memory import sparse
from haulier.memory.pagefile import punch
from haulier.units import PAGE

FRAME: Final = 32
"""Pages in a record at most."""
GROUP: Final = 4
"""Pages that are compressed, and opened, together: of more the ratio is hardly better."""
_LEVEL: Final = 1
_WORTH: Final = 0.8
"""Of its pages' bytes, what a record may take at most."""
_MAGIC: Final = b"HAULPACK"
_HEAD: Final = struct.Struct(">8sII8s")
_NONE: Final = 0xFFFFFFFF


class PackedPages:
    """Of a mirror of that many pages, in the file `fd` from `offset` on; `write` stores bytes there. One thread."""

    def __init__(self, fd: int, offset: int, pages: int, write: Callable[[bytes, int], None]) -> None:
        self._fd, self._end, self._write = fd, offset, write
        self._frame = np.full(pages, _NONE, np.uint32)
        self._slot = np.zeros(pages, np.uint8)
        self._places: list[tuple[int, int]] = []
        """Of each record: where it is, and how long."""
        self._cuts: list[list[int]] = []
        """Of each record: where its frames begin in the file, and where the last one ends."""
        self._live: list[int] = []
        self._compressor = zstd.ZstdCompressor(_LEVEL)

    def holds(self, gidx: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these pages are here."""
        found: NDArray[np.bool_] = self._frame[gidx] != _NONE
        return found

    @property
    def all(self) -> NDArray[np.int64]:
        """The pages that are here, ascending."""
        return np.flatnonzero(self._frame != _NONE)

    def add(self, gidx: NDArray[np.int64], pages: NDArray[np.uint8]) -> bool:
        """Takes up to FRAME pages, none of which is here, u8 (n, 4096); False if that would save too little."""
        frames = [
            self._compressor.compress(pages[at : at + GROUP].data, zstd.ZstdCompressor.FLUSH_FRAME)
            for at in range(0, len(pages), GROUP)
        ]
        lengths = [len(frame) for frame in frames]
        if sum(lengths) > _WORTH * pages.nbytes:
            return False
        rest = gidx.astype("<u4").tobytes() + np.array(lengths, "<u4").tobytes() + b"".join(frames)
        record = _HEAD.pack(_MAGIC, len(gidx), sum(lengths), xxhash.xxh3_64_digest(rest)) + rest
        self._write(record, self._end)
        first = self._end + len(record) - sum(lengths)
        self._cuts.append([first, *(first + end for end in itertools.accumulate(lengths))])
        self._frame[gidx] = len(self._places)
        self._slot[gidx] = np.arange(len(gidx))
        self._places.append((self._end, len(record)))
        self._live.append(len(gidx))
        self._end += -(-len(record) // PAGE) * PAGE
        return True

    def read(self, gidx: NDArray[np.int64], out: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        """Puts these pages, all of which are here, into these rows of `out`."""
        groups = self._frame[gidx].astype(np.int64) * FRAME + self._slot[gidx] // GROUP
        order = np.argsort(groups, kind="stable")
        ordered = groups[order]
        cuts = [0, *((ordered[1:] != ordered[:-1]).nonzero()[0] + 1).tolist(), len(order)]
        for start, end in itertools.pairwise(cuts):
            mine = order[start:end]
            record, group = divmod(int(ordered[start]), FRAME)
            begin, stop = self._cuts[record][group : group + 2]
            found = np.frombuffer(zstd.decompress(os.pread(self._fd, stop - begin, begin)), np.uint8).reshape(-1, PAGE)
            out[rows[mine]] = found[self._slot[gidx[mine]] % GROUP]

    def drop(self, gidx: NDArray[np.int64]) -> None:
        """These pages (no page twice) are not here any more, if they were."""
        frames = self._frame[gidx]
        here = frames != _NONE
        if not here.any():
            return
        self._frame[gidx[here]] = _NONE
        for frame, count in zip(*(part.tolist() for part in np.unique(frames[here], return_counts=True)), strict=True):
            self._live[frame] -= count
            if not self._live[frame]:
                offset, length = self._places[frame]
                punch(self._fd, offset, -(-length // PAGE) * PAGE)


def _opened(record: bytes) -> tuple[NDArray[np.int64], NDArray[np.uint8]] | None:
    """A record's pages and their indexes; None if it is none. There may be bytes behind it."""
    if len(record) < _HEAD.size:
        return None
    magic, count, length, checksum = _HEAD.unpack_from(record)
    if magic != _MAGIC or not 1 <= count <= FRAME:
        return None
    table = _table(count)
    rest = record[_HEAD.size : _HEAD.size + table + length]
    if len(rest) != table + length or xxhash.xxh3_64_digest(rest) != checksum:
        return None
    pages, at = bytearray(), table
    for number, size in enumerate(
        np.frombuffer(rest, "<u4", offset=4 * count, count=(table - 4 * count) // 4).tolist()
    ):
        expected = PAGE * min(GROUP, count - number * GROUP)
        try:
            found = zstd.ZstdDecompressor().decompress(rest[at : at + size], expected + 1)
        except zstd.ZstdError:
            return None
        if len(found) != expected:
            return None
        pages += found
        at += size
    return np.frombuffer(rest, "<u4", count).astype(np.int64), np.frombuffer(pages, np.uint8).reshape(-1, PAGE)


def _table(count: int) -> int:
    """Bytes between the head and the frames of a record of so many pages."""
    return 4 * count + 4 * -(-count // GROUP)


def left(fd: int, offset: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """What a dead process left in its file from `offset` on: indexes and pages of each whole record, in their order."""
    end = os.fstat(fd).st_size
    most = _HEAD.size + _table(FRAME) + FRAME * PAGE
    done = offset
    for start, stop in sparse.data_extents(fd, offset, end):
        at = max(done, start // PAGE * PAGE)
        while at < stop:
            found = _opened(os.pread(fd, most, at))
            length = PAGE
            if found is not None:
                (length,) = struct.unpack(">I", os.pread(fd, 4, at + 12))
                length += _HEAD.size + _table(len(found[0]))
                yield found
            at += -(-length // PAGE) * PAGE
        done = at
