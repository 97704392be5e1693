"""Pages that go beside the stream (urgent ones of post-copy), as differences to what the target certainly has.

Mostly that is the mirror: QEMU sends each page of post-copy once, so that of an urgent page both mirrors still hold
what pre-copy brought, once the target has taken those batches. Or it is a block of the disk. The bytes are XORed where
they lie; what is alike becomes zeros, which cost nothing. Whoever puts them back checks them.

The table has for each page so treated u32 offset of its bytes, u8 kind (0: mirror, 1: disk block), u32 page's index in
the mirror or block's id, little-endian.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier.errors import Corrupt, HaulierError
from haulier.memory.format import RECORD
from haulier.memory.mirror import Mirror
from haulier.memory.pages import BlockReader
from haulier.memory.proxy import SourceProxy
from haulier.memory.sparse import WORDS
from haulier.memory.stream import Pages, StreamParser
from haulier.units import PAGE

PLACE: Final = np.dtype([("offset", "<u4"), ("kind", "u1"), ("number", "<u4")])
MIRROR: Final = 0
BLOCK: Final = 1
_NEAR: Final = WORDS // 2
"""Words of a page that may differ, of 512, for the difference to be less than the page."""


class Referring:
    """At the source, of a connection that has nothing but records. `pages` counts what was referred, `plain` the rest.

    After the first thing in the stream that is not understood all goes as it is.
    """

    def __init__(self, proxy: SourceProxy) -> None:
        self.pages = self.plain = 0
        self.begun = False
        self._proxy = proxy
        self._parser: StreamParser | None = None

    def refer(self, data: bytes) -> tuple[bytes, bytes]:
        """The bytes with differences in place of pages, and the table of those."""
        mirror = self._proxy.mirror
        if mirror is None:
            return data, b""
        self.begun = True
        if self._parser is None:
            self._parser = StreamParser(blocks=mirror.blocks, bare=True)
        at = -len(self._parser.pending)
        try:
            tokens = self._parser.feed(data)
        except HaulierError:
            return data, b""
        places: list[tuple[int, int, int]] = []
        out = bytearray(data)
        for token in tokens:
            at += token.size
            if not isinstance(token, Pages):
                continue
            gidx = token.addresses.view(np.int64) // PAGE + mirror.first[token.block]
            kinds, numbers, others = self._nearest(mirror, gidx, token.pages)
            # A record ends with its page; the token's last record ends where the token does.
            offsets = at - PAGE - np.arange(len(gidx) - 1, -1, -1) * RECORD
            chosen = (kinds >= 0) & (offsets >= 0)
            self.pages += int(chosen.sum())
            self.plain += int((~chosen).sum())
            for row in chosen.nonzero()[0].tolist():
                offset = int(offsets[row])
                out[offset : offset + PAGE] = (token.pages[row] ^ others[row]).tobytes()
                places.append((offset, int(kinds[row]), int(numbers[row])))
        return bytes(out), np.array(places, PLACE).tobytes()

    def _nearest(
        self, mirror: Mirror, gidx: NDArray[np.int64], pages: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
        """For each page: kind (-1: none), number, and the bytes to refer to."""
        others = mirror.get(gidx)
        numbers = gidx.copy()
        near = (np.ascontiguousarray(pages).view(np.uint64) != others.view(np.uint64)).sum(axis=1) < _NEAR
        kinds = np.where(near & mirror.present[gidx], MIRROR, -1)
        far = (kinds < 0).nonzero()[0]
        if self._proxy.finder is not None and len(far):
            found = self._proxy.finder.find(np.ascontiguousarray(pages[far]))
            hit = far[found >= 0]
            kinds[hit], numbers[hit], others[hit] = BLOCK, found[found >= 0], pages[hit]
        return kinds, numbers, others


def resolve(data: bytes, table: bytes, mirror: Mirror | None, reader: BlockReader | None) -> bytes:
    """The bytes that `refer` was given. Corrupt for a table that cannot be; whether they are right is not checked."""
    if not table:
        return data
    if mirror is None or len(table) % PLACE.itemsize:
        raise Corrupt("urgent pages refer to what this site does not have: run the same haulier at both sites")
    places = np.frombuffer(table, PLACE)
    kinds, numbers = places["kind"], places["number"].astype(np.int64)
    offsets = places["offset"].astype(np.int64)
    mine, blocks = (kinds == MIRROR).nonzero()[0], (kinds == BLOCK).nonzero()[0]
    wrong = len(mine) + len(blocks) != len(places) or (offsets + PAGE > len(data)).any()
    if wrong or (numbers[mine] >= mirror.pages).any() or (len(blocks) and reader is None):
        raise Corrupt("urgent pages refer to what this site does not have: run the same haulier at both sites")
    others = np.empty((len(places), PAGE), np.uint8)
    if len(mine):
        others[mine] = mirror.get(numbers[mine])
    if len(blocks) and reader is not None:
        others[blocks] = reader.read(numbers[blocks].astype(np.uint32))
    out = np.frombuffer(bytearray(data), np.uint8)
    for offset, other in zip(offsets.tolist(), others, strict=True):
        out[offset : offset + PAGE] ^= other
    return out.tobytes()
