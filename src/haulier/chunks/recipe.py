"""Recipes: a chunk told as references to 4 KiB blocks that both sites hold, and the rest as it is.

Independent builds of one distribution share most of their 4 KiB blocks and next to none of their 64 KiB chunks.
Layout, little endian: u32 of sixteen 2-bit kinds (block 0 in the lowest bits: 0 zero, 1 reference, 2 literal); for
each reference u32, the block id less the one before less 1 (a run of blocks is zeros, which compress away; the first
is less 0); then the literals, 4096 bytes each.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from haulier.chunks.blocks import BlockIndex, BlockSpace, StoreBlockFinder
from haulier.errors import Corrupt, UnknownThing, UsageError
from haulier.units import BLOCK, BLOCKS_PER_CHUNK, CHUNK

_ZERO: Final = 0
_REFERENCE: Final = 1
_LITERAL: Final = 2
_SHIFTS: Final = np.arange(0, 2 * BLOCKS_PER_CHUNK, 2, dtype=np.uint32)


def encode(chunk: bytes, index: BlockIndex, space: BlockSpace) -> bytes | None:
    """The recipe of a chunk; None when no block of it can be referred to. Blocks are compared, not only hashed."""
    if len(chunk) != CHUNK:
        raise UsageError(f"a chunk of {len(chunk)} bytes, not {CHUNK}")
    blocks = np.frombuffer(chunk, dtype=np.uint8).reshape(BLOCKS_PER_CHUNK, BLOCK)
    filled = blocks.view(np.uint64).any(axis=1)
    ids = np.full(BLOCKS_PER_CHUNK, -1, dtype=np.int64)
    where = np.flatnonzero(filled)
    ids[where] = StoreBlockFinder(index, space).find(np.ascontiguousarray(blocks[where]))
    referred = ids >= 0
    if not referred.any():
        return None
    kinds = np.where(referred, _REFERENCE, np.where(filled, _LITERAL, _ZERO)).astype(np.uint32)
    word = np.bitwise_or.reduce(kinds << _SHIFTS)
    refs = ids[referred]
    steps = np.concatenate((refs[:1], np.diff(refs) - 1)).astype(np.uint32)
    literals = blocks[filled & ~referred]
    return b"".join((int(word).to_bytes(4, "little"), steps.astype("<u4").tobytes(), literals.tobytes()))


def decode(recipe: bytes, space: BlockSpace) -> bytes:
    """The 64 KiB of a recipe. The caller checks the fingerprint. Raises Corrupt when it is malformed."""
    if len(recipe) < 4:
        raise Corrupt(f"recipe of {len(recipe)} bytes is cut short; ask for the chunk itself")
    kinds = (np.uint32(int.from_bytes(recipe[:4], "little")) >> _SHIFTS) & 3
    if (kinds > _LITERAL).any():
        raise Corrupt("recipe has a block of unknown kind; ask for the chunk itself")
    references = int((kinds == _REFERENCE).sum())
    literals = int((kinds == _LITERAL).sum())
    if len(recipe) != 4 + 4 * references + BLOCK * literals:
        raise Corrupt(f"recipe of {len(recipe)} bytes does not fit its kinds; ask for the chunk itself")
    blocks = np.zeros((BLOCKS_PER_CHUNK, BLOCK), dtype=np.uint8)
    steps = np.frombuffer(recipe, dtype="<u4", count=references, offset=4).astype(np.uint32)
    steps[1:] += 1
    try:
        blocks[kinds == _REFERENCE] = space.read(np.cumsum(steps, dtype=np.uint32))
    except UnknownThing as error:
        raise Corrupt(f"recipe refers to a block that this site does not have: {error}") from error
    blocks[kinds == _LITERAL] = np.frombuffer(recipe, dtype=np.uint8, offset=4 + 4 * references).reshape(-1, BLOCK)
    return blocks.tobytes()
