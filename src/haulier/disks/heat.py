"""How often each chunk of a disk was read: what will probably be read next, what to bring first. No I/O but one file.

One byte a chunk, which stays at 255. Reads that the guest's page cache or its overlay answers are not seen here; what
is seen is what it had to come to the disk for.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np

from haulier.chunks.fingerprint import ZERO
from haulier.chunks.manifest import Manifest
from haulier.compress import zstd
from haulier.errors import Corrupt

HOT_READS: Final = 2
HOT_BYTES: Final = 32 << 20


class Heat:
    """Counts of one disk of `chunks` chunks."""

    def __init__(self, chunks: int) -> None:
        self.counts = np.zeros(chunks, dtype=np.uint8)
        self.changed = False

    def touch(self, first: int, last: int) -> None:
        """Chunks `first` to `last` (inclusive) were read."""
        part = self.counts[first : last + 1]
        np.add(part, 1, out=part, where=part < 255)
        self.changed = True

    def merge(self, counts: bytes) -> None:
        """Counts of an earlier stay elsewhere. Corrupt if they are of another disk."""
        if len(counts) != len(self.counts):
            raise Corrupt(f"counts of {len(counts)} chunks for a disk of {len(self.counts)}")
        self.counts = np.maximum(self.counts, np.frombuffer(counts, dtype=np.uint8))
        self.changed = True

    def order(self, indexes: Iterable[int]) -> list[int]:
        """`indexes` by how often they were read, in the order of the disk among equals."""
        chosen = np.fromiter(indexes, dtype=np.int64)
        return [int(i) for i in chosen[np.lexsort((chosen, -self.counts[chosen].astype(np.int64)))]]

    def save(self, path: Path) -> None:
        new = path.with_name(path.name + ".new")
        new.write_bytes(self.counts.tobytes())
        new.replace(path)
        self.changed = False


def read_heat(path: Path, chunks: int) -> bytes | None:
    """The counts in a file; None if there is none, or it is of another disk."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    return raw if len(raw) == chunks else None


def hot_chunks(manifest: Manifest, counts: bytes | None, budget: int = HOT_BYTES) -> set[bytes]:
    """Fingerprints of what is read again and again, hottest first within `budget` bytes."""
    if counts is None or len(counts) != len(manifest):
        return set()
    heat = Heat(len(manifest))
    heat.merge(counts)
    found: set[bytes] = set()
    for index in heat.order(int(i) for i in np.flatnonzero(heat.counts >= HOT_READS)):
        fp = manifest[index]
        if fp != ZERO:
            found.add(fp)
        if len(found) * 65536 >= budget:
            break
    return found


def pack(counts: bytes) -> bytes:
    """For the wire."""
    return zstd.compress(counts, 9)


def unpack(packed: bytes, chunks: int) -> bytes:
    """Corrupt if it is not the counts of a disk of so many chunks."""
    engine = zstd.ZstdDecompressor()
    try:
        counts = engine.decompress(packed, chunks + 1)
    except zstd.ZstdError as error:
        raise Corrupt(f"counts of reads do not unpack ({error})") from None
    if len(counts) != chunks:
        raise Corrupt(f"counts of {len(counts)} chunks for a disk of {chunks}")
    return counts
