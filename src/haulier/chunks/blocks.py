"""4 KiB blocks as things to refer to: the list of chunks that two sites share, and an index of its blocks by hash.

A block id is `position of the chunk in the list * 16 + block within the chunk`; it means the same at both sites as
long as both append the same chunks in the same order.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from haulier.chunks.fingerprint import ZERO
from haulier.chunks.packs import disk_error
from haulier.chunks.store import ChunkStore
from haulier.durable import sync
from haulier.errors import Corrupt, NoRoom, UnknownThing, UsageError
from haulier.units import BLOCK, BLOCKS_PER_CHUNK, FINGERPRINT

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

MAX_POSITIONS: Final = (1 << 32) // BLOCKS_PER_CHUNK

_INDEX: Final = struct.Struct("<8sIIQQ32x")  # magic, version, 0, count, xxh3-64 of the columns
_INDEX_MAGIC: Final = b"HBLOCKIX"
_INDEX_VERSION: Final = 1
_ZERO_BLOCK: Final = bytes(BLOCK)


class BlockSpace:
    """An append-only list of chunks whose blocks can be referred to. Safe from any thread."""

    def __init__(self, store: ChunkStore) -> None:
        self.store = store
        self._fps: list[bytes] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._fps)

    def append(self, fps: Sequence[bytes]) -> None:
        """Add chunks at the end. They must be in the store by the time they are read. Raises NoRoom when full."""
        if any(len(fp) != FINGERPRINT for fp in fps):
            raise UsageError(f"a fingerprint has {FINGERPRINT} bytes")
        with self._lock:
            if len(self._fps) + len(fps) > MAX_POSITIONS:
                raise NoRoom(f"a block space holds {MAX_POSITIONS} chunks; start this handoff again")
            self._fps.extend(fps)

    def fingerprint(self, position: int) -> bytes:
        """The chunk at a position. Raises UnknownThing."""
        if not 0 <= position < len(self._fps):
            raise UnknownThing(f"chunk {position} of a block space of {len(self._fps)}")
        return self._fps[position]

    def read(self, ids: U32) -> U8:
        """Blocks, u8[n, 4096], in the order of `ids`. Raises UnknownThing for an id beyond, Corrupt for a bad chunk."""
        blocks, failed = self._read(ids, tolerant=False)
        assert failed is None
        return blocks

    def read_known(self, ids: U32) -> tuple[U8, NDArray[np.bool_]]:
        """Like `read`, but tells which could be read instead of raising; the others are zeros."""
        blocks, failed = self._read(ids, tolerant=True)
        return blocks, np.ones(len(ids), dtype=np.bool_) if failed is None else ~failed

    def _read(self, ids: U32, tolerant: bool) -> tuple[U8, NDArray[np.bool_] | None]:
        wanted = np.asarray(ids, dtype=np.uint32)
        if not len(wanted):
            return np.empty((0, BLOCK), dtype=np.uint8), None
        # In ascending order, so that neighbours in a chunk are read at once; put back into the caller's order below.
        order = np.argsort(wanted, kind="stable")
        ordered = wanted[order]
        starts = np.flatnonzero((np.diff(ordered) != 1) | (ordered[1:] % BLOCKS_PER_CHUNK == 0)) + 1
        buffer = np.zeros((len(wanted), BLOCK), dtype=np.uint8)
        view = buffer.data.cast("B")
        failed: NDArray[np.bool_] | None = None
        firsts = [0, *starts.tolist()]
        for block, start, end in zip(ordered[firsts].tolist(), firsts, [*firsts[1:], len(wanted)], strict=True):
            position, within = divmod(block, BLOCKS_PER_CHUNK)
            try:
                fp = self.fingerprint(position)
                if fp != ZERO:
                    self.store.read_into(fp, within * BLOCK, view[start * BLOCK : end * BLOCK])
            except (UnknownThing, Corrupt):
                if not tolerant:
                    raise
                if failed is None:
                    failed = np.zeros(len(wanted), dtype=np.bool_)
                failed[order[start:end]] = True
        out = np.empty_like(buffer)
        out[order] = buffer
        return out, failed


class BlockIndex:
    """xxh3-64 of blocks -> block id. Sorted columns (memory-mapped when loaded) under an overlay for what is added.

    Of equal hashes the one that came first wins. A hash decides nothing: whoever looks up compares the bytes.
    """

    def __init__(self, hashes: U64 | None = None, ids: U32 | None = None) -> None:
        self._hashes = np.empty(0, dtype=np.uint64) if hashes is None else hashes
        self._ids = np.empty(0, dtype=np.uint32) if ids is None else ids
        self._overlay = (np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint32))
        self._added: list[tuple[U64, U32]] = []
        self._lock = threading.Lock()

    @classmethod
    def build(cls, store: ChunkStore, fps: Sequence[bytes], first_block: int = 0) -> BlockIndex:
        """Index the non-zero blocks of chunks; the first chunk's first block gets id `first_block`."""
        index = cls()
        hashes, ids = hash_blocks(store, fps, first_block)
        index._hashes, index._ids = _sorted(hashes, ids)
        return index

    def __len__(self) -> int:
        """Distinct hashes, counting those both in the base and added twice."""
        with self._lock:
            return len(self._hashes) + len(self._settled()[0])

    def add(self, hashes: U64, ids: U32) -> None:
        """Index more blocks: n hashes and their n ids."""
        if len(hashes) != len(ids):
            raise UsageError(f"{len(hashes)} hashes and {len(ids)} block ids")
        with self._lock:
            self._added.append((np.asarray(hashes, dtype=np.uint64), np.asarray(ids, dtype=np.uint32)))

    def lookup(self, hashes: U64) -> I64:
        """Ids of the blocks with these hashes, -1 where there is none."""
        wanted = np.asarray(hashes, dtype=np.uint64)
        with self._lock:
            overlay = self._settled()
        found = _search(self._hashes, self._ids, wanted)
        if len(overlay[0]):
            found = np.where(found >= 0, found, _search(*overlay, wanted))
        return found

    def _settled(self) -> tuple[U64, U32]:
        if self._added:
            columns = [self._overlay, *self._added]
            self._overlay = _sorted(
                np.concatenate([column[0] for column in columns]), np.concatenate([column[1] for column in columns])
            )
            self._added = []
        return self._overlay

    def save(self, path: Path) -> None:
        """Write base and overlay to a file, atomically and durably. Raises NoRoom."""
        with self._lock:
            overlay = self._settled()
        hashes, ids = _sorted(np.concatenate((self._hashes, overlay[0])), np.concatenate((self._ids, overlay[1])))
        columns = hashes.astype("<u8").tobytes() + ids.astype("<u4").tobytes()
        head = _INDEX.pack(_INDEX_MAGIC, _INDEX_VERSION, 0, len(hashes), xxh3_64_intdigest(columns))
        part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            try:
                with open(part, "wb") as file:
                    file.write(head + columns)
                    file.flush()
                    os.fsync(file.fileno())
                part.rename(path)
                sync(path.parent)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, path) from error

    @classmethod
    def load(cls, path: Path) -> BlockIndex:
        """Map a saved index. Raises UnknownThing when there is none, Corrupt when its bytes are not as written."""
        try:
            with open(path, "rb") as file:
                head = file.read(_INDEX.size)
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            raise UnknownThing(f"no block index at {path}; warm the image again") from None
        if len(head) < _INDEX.size:
            raise Corrupt(f"block index {path} is cut short; remove it and warm the image again")
        magic, version, _, count, check = _INDEX.unpack(head)
        if magic != _INDEX_MAGIC or version != _INDEX_VERSION or size != _INDEX.size + 12 * count:
            raise Corrupt(f"{path} is no block index of this version; remove it and warm the image again")
        if not count:
            return cls()
        columns = np.memmap(path, dtype=np.uint8, mode="r", offset=_INDEX.size)
        if xxh3_64_intdigest(columns.data) != check:
            raise Corrupt(f"block index {path} does not match its checksum; remove it and warm the image again")
        hashes = columns[: 8 * count].view("<u8")
        ids = columns[8 * count :].view("<u4")
        return cls(hashes.astype(np.uint64, copy=False), ids.astype(np.uint32, copy=False))


class StoreBlockFinder:
    """Finds pages of memory among the blocks of a space: by hash, then by comparing the bytes."""

    def __init__(self, index: BlockIndex, space: BlockSpace) -> None:
        self.index = index
        self.space = space

    def find(self, pages: U8) -> I64:
        """Block ids of pages u8[n, 4096], -1 where no equal block is held."""
        found = self.index.lookup(hash_pages(pages))
        # Ids beyond the space are of an index that runs ahead of it.
        known = np.flatnonzero((found >= 0) & (found < len(self.space) * BLOCKS_PER_CHUNK))
        result = np.full(len(found), -1, dtype=np.int64)
        if len(known):
            blocks, good = self.space.read_known(found[known].astype(np.uint32))
            candidates = pages if len(known) == len(pages) else pages[known]
            same = good & (blocks.view(np.uint64) == candidates.view(np.uint64)).all(axis=1)
            result[known[same]] = found[known[same]]
        return result


def hash_pages(pages: U8) -> U64:
    """xxh3-64 of each 4096-byte row."""
    if not len(pages):
        return np.empty(0, dtype=np.uint64)
    flat = np.ascontiguousarray(pages).data.cast("B")
    return np.fromiter(
        (xxh3_64_intdigest(flat[at : at + BLOCK]) for at in range(0, len(flat), BLOCK)),
        dtype=np.uint64,
        count=len(flat) // BLOCK,
    )


def hash_blocks(store: ChunkStore, fps: Sequence[bytes], first_block: int = 0) -> tuple[U64, U32]:
    """(hashes, ids) of the non-zero blocks of chunks, for `BlockIndex.add`. A chunk seen before is not read again.

    One that is not here (an image of which the cache gave up a part) has no blocks to offer.
    """
    hashes: list[int] = []
    ids: list[int] = []
    seen: set[bytes] = {ZERO}
    for number, fp in enumerate(fps):
        if fp in seen:
            continue
        seen.add(fp)
        try:
            data = memoryview(store.get(fp))
        except UnknownThing:
            continue
        base = first_block + number * BLOCKS_PER_CHUNK
        for block in range(BLOCKS_PER_CHUNK):
            piece = data[block * BLOCK : (block + 1) * BLOCK]
            if piece != _ZERO_BLOCK:
                hashes.append(xxh3_64_intdigest(piece))
                ids.append(base + block)
    return np.array(hashes, dtype=np.uint64), np.array(ids, dtype=np.uint32)


def _sorted(hashes: U64, ids: U32) -> tuple[U64, U32]:
    """By hash, each once, the first occurrence kept."""
    unique, first = np.unique(hashes, return_index=True)
    return unique, ids[first]


def _search(hashes: U64, ids: U32, wanted: U64) -> I64:
    if not len(hashes):
        return np.full(len(wanted), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
    return np.where(hashes[at] == wanted, ids[at].astype(np.int64), -1)
