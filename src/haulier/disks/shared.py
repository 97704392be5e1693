"""The block space as the source may use it: only blocks of chunks that the target holds."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np

from haulier.chunks.blocks import I64, U32, U64, BlockIndex, BlockSpace, hash_blocks
from haulier.chunks.fingerprint import ZERO
from haulier.chunks.store import ChunkStore
from haulier.units import BLOCKS_PER_CHUNK


class HeldIndex(BlockIndex):
    """A BlockIndex that finds no block of a chunk that the target lacks. What is added goes to the index below."""

    def __init__(self, index: BlockIndex) -> None:
        super().__init__()
        self._below = index
        self.lacking = np.zeros(0, dtype=np.bool_)
        """One flag for each position of the space; what lies beyond is held."""

    def lookup(self, hashes: U64) -> I64:
        found = self._below.lookup(hashes)
        lacking = self.lacking
        if not len(lacking):
            return found
        positions = found // BLOCKS_PER_CHUNK
        known = (found >= 0) & (positions < len(lacking))
        hidden = known & lacking[np.where(known, positions, 0)]
        return np.where(hidden, -1, found)

    def add(self, hashes: U64, ids: U32) -> None:
        self._below.add(hashes, ids)

    def __len__(self) -> int:
        return len(self._below)


class SharedBlocks:
    """Block space and index of the source, kept in step with what the target holds."""

    def __init__(self, space: BlockSpace, index: BlockIndex, store: ChunkStore) -> None:
        self.space = space
        self.index = HeldIndex(index)
        self._store = store
        self._waiting: dict[bytes, list[int]] = {}

    def lacking(self, flags: Sequence[bool]) -> None:
        """Which positions of the space the target lacks."""
        self._waiting = {}
        table = np.array(flags, dtype=np.bool_)
        for position in np.flatnonzero(table).tolist():
            fp = self.space.fingerprint(position)
            if fp == ZERO:
                table[position] = False
            else:
                self._waiting.setdefault(fp, []).append(position)
        self.index.lacking = table

    def present(self, fp: bytes) -> None:
        """The target has this chunk from now on."""
        positions = self._waiting.pop(fp, None)
        if positions:
            self.index.lacking[positions] = False

    def append(self, fps: Sequence[bytes], without: Container[bytes] = ()) -> None:
        """Chunks that the target has committed: they come to the space, and but for those in `without` (the target
        knows of them and has not got them) to the index."""
        if not fps:
            return
        first = len(self.space) * BLOCKS_PER_CHUNK
        self.space.append(fps)
        self.index.add(*hash_blocks(self._store, [ZERO if fp in without else fp for fp in fps], first))


def space_fingerprints(space: BlockSpace) -> list[bytes]:
    """The chunks of a space, in order."""
    return [space.fingerprint(position) for position in range(len(space))]
