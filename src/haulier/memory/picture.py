"""Pages by number to wire batches, for memory that comes from no QEMU: the pages of a container's processes.

The batches are those of `proxy` (a TargetProxy takes them): the pages are put as records of one RAM block, PICTURE,
into a stream that nobody else reads, so checksums and the digest of all of it mean the same as for a VM.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import xxhash
from blake3 import blake3
from numpy.typing import NDArray

from haulier.compress import StreamCompressor
from haulier.compress.stream import DEFAULT_WINDOW_LOG, window
from haulier.memory import sparse
from haulier.memory.base import MemoryBase
from haulier.memory.mirror import Mirror
from haulier.memory.mirrorfile import encode_table
from haulier.memory.pages import BlockFinder, PageEncoder
from haulier.memory.proxy import PAGES, TABLE, Counters, WireBatch
from haulier.memory.stream import Pages, Token, Zeros, rebuild_all
from haulier.units import PAGE

PICTURE: Final = "processes"
BATCH_PAGES: Final = 120
COMPARED: Final = 64
"""Pages compared at once."""
_MEMCMP: Final = ctypes.CDLL(None).memcmp
_MEMCMP.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_HEAD: Final = struct.Struct("<BIII16s")


class PictureSource:
    """The source's end. `pages` is how many the picture has; the mirror's file is made at once.

    `dictionary` is what both hosts have, whatever runs. One thread at a time. What `send` gives has to reach the peer,
    in order.
    """

    def __init__(
        self,
        mirror: Path,
        pages: int,
        base: MemoryBase | None,
        finder: BlockFinder | None,
        *,
        level: int = 3,
        window_log: int = DEFAULT_WINDOW_LOG,
        dictionary: bytes = b"",
    ) -> None:
        self.mirror = Mirror.create(mirror, {PICTURE: pages * PAGE}, base, packs=False)
        self.counters = Counters()
        self._compressor = StreamCompressor(level, *window(level, window_log, level >= 3), dictionary)
        self._encoder = PageEncoder(self.mirror, finder)
        self._sequence = 0
        self._digest = blake3()

    def begin(self) -> WireBatch:
        """The first batch: what the picture is."""
        table = encode_table(self.mirror.blocks)
        return self._batch(TABLE, 0, len(table), bytes(16), table)

    def differing(self, numbers: NDArray[np.int64], pages: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Rows of `pages`, u8 (n, 4096) contiguous, that are not what the peer has under these numbers (n)."""
        found: list[NDArray[np.int64]] = []
        view = self.mirror.view
        for position, count in sparse.runs(numbers):
            for at in range(position, position + count, COMPARED):
                many = min(COMPARED, position + count - at)
                number = int(numbers[at])
                theirs, mine = view[number : number + many], pages[at : at + many]
                if _MEMCMP(theirs.ctypes.data, mine.ctypes.data, many * PAGE):
                    rows = (theirs.view(np.uint64) != mine.view(np.uint64)).any(axis=1).nonzero()[0]
                    found.append(rows.astype(np.int64) + at)
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def send(self, numbers: NDArray[np.int64], pages: NDArray[np.uint8]) -> Iterator[WireBatch]:
        """Batches that make the peer's pages of these numbers (no number twice) equal to `pages`, u8 (n, 4096)."""
        for start in range(0, len(numbers), BATCH_PAGES):
            yield self._encode(numbers[start : start + BATCH_PAGES], pages[start : start + BATCH_PAGES])

    def _encode(self, numbers: NDArray[np.int64], pages: NDArray[np.uint8]) -> WireBatch:
        pages = np.ascontiguousarray(pages)
        filled = sparse.nonzero(pages)
        addresses = (numbers * PAGE).astype(np.uint64)
        tokens: list[Token] = []
        if filled.any():
            tokens.append(Pages(PICTURE, True, addresses[filled], np.ascontiguousarray(pages[filled])))
        if not filled.all():
            tokens.append(Zeros(PICTURE, True, addresses[~filled]))
        raw = rebuild_all(tokens)
        self._digest.update(raw)
        batch = self._encoder.encode(tokens)
        for kind, count in batch.pages.items():
            if count:
                self.counters.pages[kind] = self.counters.pages.get(kind, 0) + count
        self.counters.raw_bytes += len(raw)
        data = self._compressor.compress(*batch.parts)
        return self._batch(PAGES, len(raw), batch.size, xxhash.xxh3_128_digest(raw), data)

    def _batch(self, kind: int, raw: int, plain: int, checksum: bytes, data: bytes) -> WireBatch:
        head = _HEAD.pack(kind, self._sequence, raw, plain, checksum)
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self.counters.batches += 1
        self.counters.wire_bytes += len(head) + len(data)
        return WireBatch(head + data, raw)

    def digest(self) -> bytes:
        """BLAKE3 of the whole stream so far: what the target's proxy must have as well."""
        return self._digest.copy().digest()

    def keep(self) -> None:
        """Makes the mirror's file a picture of its own, for the way back. NoRoom if there is no room for it."""
        self.mirror.complete()

    def close(self) -> None:
        """Lets go of the mirror's file, which stays."""
        self.mirror.close()
