"""A golden snapshot's memory as chunks, so that it travels like a disk, and a snapshot made again out of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from haulier.chunks.blocks import BlockIndex
from haulier.chunks.fingerprint import ZERO
from haulier.chunks.manifest import SECTOR, Manifest, chunks_of
from haulier.chunks.packs import disk_error
from haulier.chunks.store import ChunkStore
from haulier.durable import sync
from haulier.errors import Corrupt
from haulier.guests.golden import MANIFEST_PREFIX, Golden, GoldenMeta, block_fingerprints, golden_id
from haulier.memory.base import MemoryBase
from haulier.memory.sparse import data_extents
from haulier.units import CHUNK, FINGERPRINT

UNFINISHED: Final = ".making-"
"""As `haulier.guests.golden` names what is not finished: an agent's start clears it away."""


def memory_manifest(golden: Golden, store: ChunkStore, lease: str, progress: Callable[[float], None]) -> Manifest:
    """The snapshot's memory file as chunks in the store, kept under `lease` only. Holes are not read."""
    with golden.memory.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        whole = -(-size // SECTOR) * SECTOR
        table = bytearray(ZERO * chunks_of(whole))
        done = -1
        for start, end in data_extents(file.fileno(), 0, size):
            for index in range(max(done + 1, start // CHUNK), chunks_of(end)):
                data = os.pread(file.fileno(), CHUNK, index * CHUNK).ljust(CHUNK, b"\0")
                table[index * FINGERPRINT : (index + 1) * FINGERPRINT] = store.put(data, lease=lease)
                done = index
                if index % 256 == 0:
                    progress(index * CHUNK / size)
    store.commit()
    return Manifest(whole, bytes(table))


def read_meta(meta: dict[str, Any], name: str) -> GoldenMeta:
    """What another site says of a snapshot. Corrupt unless it is what its id, `name`, says."""
    try:
        found = msgspec.convert(meta, GoldenMeta)
    except msgspec.ValidationError as error:
        raise Corrupt(f"golden snapshot {name[:64]!r} came with notes that make no sense ({error})") from None
    if found.id != name or golden_id(found) != name or not 0 < found.memory_size < 1 << 42:
        raise Corrupt(f"golden snapshot {name[:64]!r} is not what its id says; push it again")
    return found


def keep_snapshot(store: ChunkStore, root: Path, meta: GoldenMeta, memory: Manifest) -> None:
    """Makes `golden/<id>` below `root` out of chunks; its disk's manifest is in the store already. Whole or not at all.

    Raises Corrupt when the memory is not the one that the id stands for.
    """
    final, half = root / meta.id, root / f"{UNFINISHED}{meta.id[:16]}"
    if final.exists():
        return
    if not 0 <= memory.size - meta.memory_size < SECTOR:
        raise Corrupt(f"the memory of golden snapshot {meta.id[:12]} came with {memory.size} bytes; push it again")
    shutil.rmtree(half, ignore_errors=True)
    try:
        half.mkdir(parents=True)
        write_disk(store, memory, meta.memory_size, half / "memory")
        base = MemoryBase.from_mapped_ram(half / "memory")
        try:
            digest = base.digest.hex()
        finally:
            base.close()
        disk = store.load_manifest(MANIFEST_PREFIX + meta.id)
        if digest != meta.memory or disk.digest.hex() != meta.manifest:
            raise Corrupt(f"golden snapshot {meta.id[:12]} arrived damaged; push it again")
        BlockIndex.build(store, block_fingerprints(disk)).save(half / "blocks.idx")
        (half / "meta.json").write_bytes(msgspec.json.format(msgspec.json.encode(meta)))
        for file in half.iterdir():
            file.chmod(0o400)
            sync(file)
        sync(half)
        half.rename(final)
        sync(root)
    except OSError as error:
        raise disk_error(error, half) from error
    finally:
        shutil.rmtree(half, ignore_errors=True)


def write_disk(store: ChunkStore, manifest: Manifest, size: int, path: Path) -> None:
    """The first `size` bytes of the disk that `manifest` describes, as a sparse file."""
    with path.open("wb") as file:
        os.ftruncate(file.fileno(), size)
        for index, fp in enumerate(manifest.chunks()):
            if fp != ZERO:
                data = memoryview(store.get(fp))[: size - index * CHUNK]
                os.pwrite(file.fileno(), data, index * CHUNK)
