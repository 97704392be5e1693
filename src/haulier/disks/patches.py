"""A chunk as a patch on the chunk that was at its place before. Pure functions.

File systems rewrite a few bytes of a block again and again (inode tables, bitmaps, logs). Such a block is sent as the
XOR of old and new, nearly all zeros, which the zstd stream around it makes small. A patch is 16 bytes, one for each
block of 4 KiB, then the bytes of the XOR and literal blocks in order.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from haulier.errors import Corrupt
from haulier.units import BLOCK, BLOCKS_PER_CHUNK, CHUNK

SAME, ZEROED, XOR, PLAIN = 0, 1, 2, 3
XOR_LIMIT: Final = BLOCK // 2
"""A block of which more bytes changed goes as it is: the XOR of two unrelated blocks compresses worse than either."""


class Patch(NamedTuple):
    """`data` is the patch; `weight` a guess of its bytes before compression that are not zeros."""

    data: bytes
    weight: int


def make_patch(old: bytes, new: bytes) -> Patch | None:
    """The patch that turns `old` into `new` (both CHUNK bytes); None when no block is the same or nearly so."""
    before, after = _blocks(old), _blocks(new)
    difference = before ^ after
    changed = np.count_nonzero(difference, axis=1)
    kinds = np.full(BLOCKS_PER_CHUNK, PLAIN, dtype=np.uint8)
    kinds[changed <= XOR_LIMIT] = XOR
    kinds[~after.any(axis=1)] = ZEROED
    kinds[changed == 0] = SAME
    if not ((kinds == SAME) | (kinds == XOR)).any():
        return None
    body = np.where((kinds == XOR)[:, None], difference, after)[kinds >= XOR]
    weight = BLOCKS_PER_CHUNK + BLOCK * int((kinds == PLAIN).sum()) + 2 * int(changed[kinds == XOR].sum())
    return Patch(kinds.tobytes() + body.tobytes(), weight)


def apply_patch(old: bytes, patch: bytes) -> bytes:
    """The new chunk. Corrupt when `patch` is not one; whether it fits `old` the fingerprint tells."""
    kinds = np.frombuffer(patch[:BLOCKS_PER_CHUNK], dtype=np.uint8)
    if len(kinds) != BLOCKS_PER_CHUNK or (kinds > PLAIN).any():
        raise Corrupt("a patch of a chunk has unknown kinds of blocks")
    carried = kinds >= XOR
    if len(patch) != BLOCKS_PER_CHUNK + BLOCK * int(carried.sum()):
        raise Corrupt(f"a patch of a chunk has {len(patch)} bytes, which its kinds of blocks do not explain")
    body = np.frombuffer(patch, dtype=np.uint8, offset=BLOCKS_PER_CHUNK).reshape(-1, BLOCK)
    new = _blocks(old).copy()
    xor = kinds == XOR
    unchanged = new[xor]
    new[carried] = body
    new[xor] ^= unchanged
    new[kinds == ZEROED] = 0
    return new.tobytes()


def _blocks(chunk: bytes) -> NDArray[np.uint8]:
    if len(chunk) != CHUNK:
        raise Corrupt(f"a chunk of {len(chunk)} bytes; chunks have {CHUNK}")
    return np.frombuffer(chunk, dtype=np.uint8).reshape(BLOCKS_PER_CHUNK, BLOCK)
