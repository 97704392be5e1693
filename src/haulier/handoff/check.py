"""Digests of a guest's memory by region, for comparing two stopped copies without sending either."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Final

import xxhash

from haulier.errors import Corrupt
from haulier.units import MIB

REGION: Final = MIB
DIGEST: Final = 16
_ZERO: Final = xxhash.xxh3_128_digest(bytes(REGION))


def memory_digests(path: Path) -> bytes:
    """One 16-byte digest (XXH3-128) for each MiB of the file, in order; holes count as zeros and are not read.

    A check against accidents, not against forgery: what arrives is guarded batch by batch and by the stream's BLAKE3.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        regions = -(-size // REGION)
        found = bytearray(_ZERO * regions)
        if not size:
            return bytes(found)
        with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            offset = 0
            while offset < size:
                try:
                    start = os.lseek(file.fileno(), offset, os.SEEK_DATA)
                except OSError:
                    break  # only a hole is left
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                for region in range(start // REGION, -(-end // REGION)):
                    piece = view[region * REGION : (region + 1) * REGION]
                    found[region * DIGEST : (region + 1) * DIGEST] = xxhash.xxh3_128_digest(piece)
                    piece.release()
                offset = -(-end // REGION) * REGION
    return bytes(found)


def differing(ours: bytes, theirs: bytes) -> list[int]:
    """Numbers of the regions whose digests differ. Raises Corrupt when the memories are of different size."""
    if len(ours) != len(theirs) or len(ours) % DIGEST:
        raise Corrupt(
            f"memory of {len(ours) // DIGEST} MiB here and {len(theirs) // DIGEST} MiB there cannot be equal: "
            "the guest's memory size differs between the sites"
        )
    return [i // DIGEST for i in range(0, len(ours), DIGEST) if ours[i : i + DIGEST] != theirs[i : i + DIGEST]]
