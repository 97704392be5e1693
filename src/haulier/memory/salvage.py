"""A mirror whose process is gone, made a picture of its own: what it holds, over the picture that it began with.

The result is a place to look for content, not a statement of what the peer holds: a batch may have been half applied,
and a page that had become zero may be the base's again. So two sites compare (`regions`) before they rely on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from haulier.errors import Corrupt, NoRoom
from haulier.memory import packing, sparse
from haulier.memory.base import MemoryBase
from haulier.memory.mirrorfile import PART, MirrorHeader, encode_header, read_header
from haulier.units import PAGE

REGION: Final = 32
"""Pages that are compared by one digest."""
_DIGEST: Final = 8
"""Bytes of a digest: enough against chance, and what chance or malice gets past it, batch checksums find."""
_COPY: Final = 2048
MAX_PAGES: Final = (15 << 20) // _DIGEST * REGION
"""Beyond this (240 GiB), the digests of regions would not go into one message, which holds 16 MiB."""
MOST_UNLIKE: Final = 1 << 15
"""Of more regions the digests of pages would not go into one message, and a picture so unlike is of little use."""


def salvage(path: Path, base: MemoryBase | None) -> None:
    """Makes the file of a mirror that was never completed a picture of its own, in place.

    Corrupt if the file is none, NoRoom if there is no room for what the base has to lend, or if two sites could not
    compare a picture of that size. Nobody may use the file.
    """
    header = check_size(path)
    offset = header.data_offset
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        _unpack(fd, header)
        os.ftruncate(fd, header.size)
        for name, length in header.blocks.items():
            if base is not None and base.blocks.get(name) == length:
                _lend(fd, offset, length, base, name)
            offset += length
        os.pwrite(fd, encode_header(header.blocks)[0], 0)
    except OSError as error:
        raise NoRoom(f"no room to keep the memory in {path}: {error.strerror}") from error
    finally:
        os.close(fd)


def check_size(path: Path) -> MirrorHeader:
    """The header of a mirror that was never completed; Corrupt if it has none, NoRoom if it has over `MAX_PAGES`."""
    header = read_header(path, PART)
    if sum(header.blocks.values()) > MAX_PAGES * PAGE:
        raise NoRoom(f"the memory in {path} is larger than what two sites compare: it will be sent anew")
    return header


def _unpack(fd: int, header: MirrorHeader) -> None:
    """Packed pages to their places, but where something newer lies."""
    pages = sum(header.blocks.values()) // PAGE
    plain = sparse.held(fd, header.data_offset, pages)
    for gidx, data in packing.left(fd, header.size):
        for page, row in zip(gidx.tolist(), data, strict=True):
            if page < pages and not plain[page] and os.pwrite(fd, row.data, header.data_offset + page * PAGE) != PAGE:
                raise NoRoom("no room to keep a guest's memory: free some, and try again")


def _lend(fd: int, offset: int, length: int, base: MemoryBase, name: str) -> None:
    mine = sparse.held(fd, offset, length // PAGE)
    view = base.view(name)
    for first, count in base.nonzero_runs(name):
        lent = np.flatnonzero(~mine[first : first + count]) + first
        for position, many in sparse.runs(lent):
            page = int(lent[position])
            for at in range(page, page + many, _COPY):
                data = memoryview(view[at : min(at + _COPY, page + many)].data).cast("B")
                if os.pwrite(fd, data, offset + at * PAGE) != len(data):
                    raise NoRoom("no room to keep a guest's memory: free some, and try again")


def names(base: MemoryBase) -> list[str]:
    """The blocks, in the order in which digests stand."""
    return sorted(base.blocks)


def _digest(pages: NDArray[np.uint8]) -> bytes:
    return blake3(pages.data).digest(_DIGEST)


def regions(base: MemoryBase) -> bytes:
    """8 bytes for each region of 32 pages of each block by name: BLAKE3's first, or zeros where all pages are zero."""
    out: list[bytes] = []
    for name in names(base):
        view = base.view(name)
        count = -(-len(view) // REGION)
        filled = np.zeros(count, np.bool_)
        for first, many in base.nonzero_runs(name):
            filled[first // REGION : (first + many - 1) // REGION + 1] = True
        digests = bytearray(count * _DIGEST)
        for region in np.flatnonzero(filled).tolist():
            digests[region * _DIGEST : (region + 1) * _DIGEST] = _digest(view[region * REGION : (region + 1) * REGION])
        out.append(bytes(digests))
    return b"".join(out)


def differing(mine: bytes, theirs: bytes) -> NDArray[np.int64]:
    """Numbers of the regions whose digests differ. Corrupt if the two pictures do not have the same form."""
    if len(mine) != len(theirs):
        raise Corrupt("the two sites' pictures of a guest's memory differ in form: begin again with 'haulier gc --all'")
    return np.flatnonzero(np.frombuffer(mine, np.uint64) != np.frombuffer(theirs, np.uint64))


def _places(base: MemoryBase, numbers: NDArray[np.int64]) -> Iterator[tuple[str, int, int]]:
    """(block, first page, pages) of those regions. Corrupt for a number that there is not."""
    at = 0
    order = iter(np.sort(numbers).tolist())
    number = next(order, None)
    for name in names(base):
        pages = len(base.view(name))
        count = -(-pages // REGION)
        while number is not None and number < at + count:
            first = (number - at) * REGION
            yield name, first, min(REGION, pages - first)
            number = next(order, None)
        at += count
    if number is not None:
        raise Corrupt(f"the other site speaks of region {number} of {at} of a guest's memory")


def pages_of(base: MemoryBase, numbers: NDArray[np.int64]) -> bytes:
    """A digest for each page of those regions, in order."""
    return b"".join(
        _digest(base.view(name)[page : page + 1])
        for name, first, count in _places(base, numbers)
        for page in range(first, first + count)
    )


def give_up(base: MemoryBase, numbers: NDArray[np.int64], unlike: NDArray[np.bool_]) -> int:
    """Makes those pages of the regions zero of which `unlike` (one a page, in order) says that the sites differ.

    Both sites do the same, so that after it their pictures are equal. Returns how many pages there were.
    """
    at = 0
    for name, first, count in _places(base, numbers):
        if at + count > len(unlike):
            raise Corrupt("the other site compared fewer pages of a guest's memory than were asked for")
        base.clear(name, np.flatnonzero(unlike[at : at + count]) + first)
        at += count
    if at != len(unlike):
        raise Corrupt("the other site compared more pages of a guest's memory than were asked for")
    return int(unlike.sum())
