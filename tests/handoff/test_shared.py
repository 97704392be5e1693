"""The block list that both ends of a handoff compute."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from haulier.chunks import recipe
from haulier.chunks.blocks import BlockIndex
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import Conflict
from haulier.handoff.shared import block_list, blocks_of, images_named, short
from haulier.units import BLOCK, CHUNK


def chunk(first: int) -> bytes:
    return b"".join(random.Random(block).randbytes(BLOCK) for block in range(first, first + 16))


def disk(store: ChunkStore, *firsts: int) -> Manifest:
    return Manifest(len(firsts) * CHUNK, b"".join(store.put(chunk(first)) for first in firsts))


def test_the_snapshots_chunks_come_first_then_common_images_then_the_disks(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as store:
        golden, image, base = disk(store, 0, 16), disk(store, 16, 32), disk(store, 0, 32, 48, 48)
        fps, count = block_list(base, golden, [image])
        assert count == 2
        assert fps == [golden[0], golden[1], image[1], base[2]]
        assert block_list(base, None, [image])[0] == [image[0], image[1], base[0], base[2]]
        assert block_list(base, golden)[0] == [golden[0], golden[1], image[1], base[2]]


@pytest.mark.parametrize("ready", [False, True])
def test_a_chunk_is_told_by_blocks_of_an_image_that_both_hold(tmp_path: Path, ready: bool) -> None:
    with ChunkStore(tmp_path) as store:
        golden, image, base = disk(store, 1000), disk(store, 0, 16), disk(store, 5)
        if ready:
            BlockIndex.build(store, [golden[0]]).save(tmp_path / "blocks.idx")
        found, space = blocks_of(store, base, golden, tmp_path / "blocks.idx", [image])
        told = recipe.encode(chunk(5), found, space)
        assert told is not None and len(told) < 100
        assert recipe.decode(told, space) == chunk(5)
        # Named by the image, which comes before the disk's own chunk.
        assert found.lookup(BlockIndex.build(store, [base[0]])._hashes).max() < 3 * 16


def test_a_snapshots_index_that_decayed_is_made_anew(tmp_path: Path) -> None:
    """A handoff that refused it would be refused each time."""
    ready = tmp_path / "blocks.idx"
    with ChunkStore(tmp_path) as store:
        golden, base = disk(store, 0, 16), disk(store, 0, 32)
        BlockIndex.build(store, [golden[0], golden[1]]).save(ready)
        hashes = BlockIndex.build(store, [golden[0], golden[1], base[1]])._hashes
        whole = blocks_of(store, base, golden, ready)[0].lookup(hashes)
        data = bytearray(ready.read_bytes())
        data[-5] ^= 1
        ready.write_bytes(data)
        assert blocks_of(store, base, golden, ready)[0].lookup(hashes).tolist() == whole.tolist()
        assert (whole >= 0).all()


def test_an_image_that_went_meanwhile_is_a_conflict(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as store:
        image = disk(store, 0)
        store.save_manifest("image/debian", image)
        assert images_named(store, [short(image)]) == [image]
        assert images_named(store, []) == []
        with pytest.raises(Conflict, match="begin it again"):
            images_named(store, ["00" * 32])
