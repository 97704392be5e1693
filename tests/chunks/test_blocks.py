from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from haulier.chunks.blocks import BlockIndex, BlockSpace, StoreBlockFinder, hash_blocks, hash_pages
from haulier.chunks.fingerprint import ZERO, ZERO_CHUNK
from haulier.chunks.store import ChunkStore
from haulier.errors import Corrupt, UnknownThing, UsageError
from haulier.units import BLOCK, BLOCKS_PER_CHUNK
from tests.chunks.samples import chunk, flip, mixed_chunk, name, place, soft_chunk

COUNT = 12


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    with ChunkStore(tmp_path / "store", reserve=0) as opened:
        yield opened


@pytest.fixture
def fps(store: ChunkStore) -> list[bytes]:
    """Random chunks with a zero chunk and a compressible one among them."""
    data = [chunk(n) for n in range(COUNT)]
    data[4] = ZERO_CHUNK
    data[6] = soft_chunk(6)
    names = [store.put(part) for part in data]
    store.commit()
    return names


@pytest.fixture
def space(store: ChunkStore, fps: list[bytes]) -> BlockSpace:
    made = BlockSpace(store)
    made.append(fps)
    return made


def block(store: ChunkStore, fps: list[bytes], number: int) -> bytes:
    at = number % BLOCKS_PER_CHUNK * BLOCK
    return store.get(fps[number // BLOCKS_PER_CHUNK])[at : at + BLOCK]


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.uint32)


@pytest.mark.parametrize("seed", range(8))
def test_blocks_come_in_the_order_asked_for(store: ChunkStore, fps: list[bytes], space: BlockSpace, seed: int) -> None:
    dice = random.Random(seed)
    wanted: list[int] = []
    for _ in range(60):
        first = dice.randrange(COUNT * BLOCKS_PER_CHUNK)
        wanted += range(first, min(first + dice.randrange(1, 40), COUNT * BLOCKS_PER_CHUNK), dice.choice([1, 1, 2]))
    if seed % 2:
        dice.shuffle(wanted)
    pages = space.read(ids(*wanted))
    assert pages.shape == (len(wanted), BLOCK)
    assert [page.tobytes() for page in pages] == [block(store, fps, number) for number in wanted]


def test_an_empty_request_is_answered(space: BlockSpace) -> None:
    assert space.read(ids()).shape == (0, BLOCK)


def test_ids_beyond_the_space_are_unknown(space: BlockSpace) -> None:
    assert len(space) == COUNT
    for bad in (COUNT * BLOCKS_PER_CHUNK, 0xFFFFFFFF):
        with pytest.raises(UnknownThing, match="block space"):
            space.read(ids(0, bad))
    with pytest.raises(UnknownThing):
        space.fingerprint(-1)


def test_a_chunk_that_is_not_there_or_damaged_is_told(store: ChunkStore, space: BlockSpace, fps: list[bytes]) -> None:
    space.append([name(99)])
    last = COUNT * BLOCKS_PER_CHUNK
    with pytest.raises(UnknownThing):
        space.read(ids(0, last + 3))
    path, offset = place(store, fps[2])
    flip(path, offset)
    with pytest.raises(Corrupt):
        BlockSpace.read(space, ids(2 * BLOCKS_PER_CHUNK))
    pages, good = space.read_known(ids(last, 16, 33, 17, 32))
    assert good.tolist() == [False, True, False, True, False]
    assert pages[1].tobytes() == block(store, fps, 16)


def test_a_space_takes_fingerprints_only(space: BlockSpace) -> None:
    with pytest.raises(UsageError):
        space.append([b"short"])


def test_a_compressed_store_reads_the_same(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "z", zstd_level=3) as store:
        names = [store.put(soft_chunk(n)) for n in range(5)]
        store.commit()
        space = BlockSpace(store)
        space.append(names)
        numbers = list(range(79, -1, -3))
        assert [page.tobytes() for page in space.read(ids(*numbers))] == [block(store, names, n) for n in numbers]


def test_every_block_is_found(store: ChunkStore, fps: list[bytes], space: BlockSpace) -> None:
    index = BlockIndex.build(store, fps)
    finder = StoreBlockFinder(index, space)
    numbers = [n for n in range(COUNT * BLOCKS_PER_CHUNK) if fps[n // 16] != ZERO]
    pages = space.read(ids(*numbers))
    found = finder.find(pages)
    assert (found >= 0).all()
    assert (space.read(found.astype(np.uint32)) == pages).all()
    assert finder.find(np.ones((3, BLOCK), dtype=np.uint8)).tolist() == [-1, -1, -1]
    assert finder.find(np.zeros((1, BLOCK), dtype=np.uint8)).tolist() == [-1]
    assert finder.find(np.zeros((0, BLOCK), dtype=np.uint8)).tolist() == []
    every_other = pages[::2]
    assert (finder.find(every_other) == found[::2]).all()


def test_the_first_of_equal_blocks_is_named(store: ChunkStore) -> None:
    same = chunk(50)[:BLOCK]
    names = [store.put(mixed_chunk(chunk(n)[:BLOCK], same, same)) for n in range(3)]
    index = BlockIndex.build(store, [*names, names[0]], first_block=160)
    assert index.lookup(hash_pages(np.frombuffer(same, dtype=np.uint8).reshape(1, -1))).tolist() == [161]
    assert len(index) == 4


def test_a_hash_alone_decides_nothing(store: ChunkStore, fps: list[bytes], space: BlockSpace) -> None:
    index = BlockIndex.build(store, fps)
    page = np.frombuffer(chunk(77)[:BLOCK], dtype=np.uint8).reshape(1, -1)
    index.add(hash_pages(page), ids(5))  # a lie: block 5 is something else
    assert index.lookup(hash_pages(page)).tolist() == [5]
    assert StoreBlockFinder(index, space).find(page).tolist() == [-1]


def test_an_index_ahead_of_the_space_finds_nothing_there(store: ChunkStore, fps: list[bytes]) -> None:
    index = BlockIndex.build(store, fps)
    space = BlockSpace(store)
    space.append(fps[:2])
    pages = np.frombuffer(chunk(1)[:BLOCK] + chunk(3)[:BLOCK], dtype=np.uint8).reshape(2, -1)
    assert StoreBlockFinder(index, space).find(pages).tolist() == [16, -1]


def test_what_a_finder_cannot_read_it_does_not_find(store: ChunkStore, fps: list[bytes], space: BlockSpace) -> None:
    index = BlockIndex.build(store, fps)
    pages = np.frombuffer(chunk(1)[:BLOCK] + chunk(3)[:BLOCK], dtype=np.uint8).reshape(2, -1)
    path, offset = place(store, fps[1])
    with store.sibling() as fresh:
        flip(path, offset)
        again = BlockSpace(fresh)
        again.append(fps)
        assert StoreBlockFinder(index, again).find(pages).tolist() == [-1, 48]


def test_blocks_added_later_are_found(store: ChunkStore, fps: list[bytes], space: BlockSpace) -> None:
    index = BlockIndex.build(store, fps)
    new = [store.put(chunk(n)) for n in (60, 61)]
    first = len(space) * BLOCKS_PER_CHUNK
    space.append(new)
    for number, fp in enumerate(new):
        index.add(*hash_blocks(store, [fp], first + number * BLOCKS_PER_CHUNK))
    pages = np.frombuffer(chunk(61), dtype=np.uint8).reshape(-1, BLOCK)
    assert StoreBlockFinder(index, space).find(pages).tolist() == list(range(first + 16, first + 32))
    with pytest.raises(UsageError):
        index.add(np.zeros(2, dtype=np.uint64), ids(1))


@given(
    hnp.arrays(np.uint64, st.integers(0, 50), elements=st.integers(0, 60)),
    hnp.arrays(np.uint64, st.integers(0, 50), elements=st.integers(0, 60)),
)
def test_lookup_agrees_with_a_dictionary(base: np.ndarray, added: np.ndarray) -> None:
    model: dict[int, int] = {}
    index = BlockIndex()
    for number, value in enumerate([*base.tolist(), *added.tolist()]):
        model.setdefault(value, number)
    for start, part in ((0, base), (len(base), added)):
        index.add(part, np.arange(start, start + len(part), dtype=np.uint32))
        index.lookup(part)
    wanted = np.arange(70, dtype=np.uint64)
    assert index.lookup(wanted).tolist() == [model.get(value, -1) for value in range(70)]


def test_a_saved_index_comes_back(store: ChunkStore, fps: list[bytes], tmp_path: Path) -> None:
    index = BlockIndex.build(store, fps)
    index.add(np.array([7, 1], dtype=np.uint64), ids(1000, 1001))
    index.save(tmp_path / "blocks.idx")
    loaded = BlockIndex.load(tmp_path / "blocks.idx")
    hashes, numbers = hash_blocks(store, fps)
    assert len(loaded) == len(index)
    assert loaded.lookup(hashes).tolist() == index.lookup(hashes).tolist()
    assert loaded.lookup(np.array([1, 2], dtype=np.uint64)).tolist() == [1001, -1]
    assert len(set(numbers.tolist())) == len(numbers)
    assert [file.name for file in tmp_path.iterdir() if "blocks" in file.name] == ["blocks.idx"]
    loaded.add(np.array([2], dtype=np.uint64), ids(5))
    assert loaded.lookup(np.array([2], dtype=np.uint64)).tolist() == [5]


def test_an_empty_index_is_saved_and_loaded(tmp_path: Path) -> None:
    BlockIndex().save(tmp_path / "i")
    assert BlockIndex.load(tmp_path / "i").lookup(np.array([1], dtype=np.uint64)).tolist() == [-1]


@pytest.mark.parametrize("damage", ["head", "column", "short", "long", "tiny", "none"])
def test_a_damaged_index_is_refused(store: ChunkStore, fps: list[bytes], tmp_path: Path, damage: str) -> None:
    path = tmp_path / "i"
    BlockIndex.build(store, fps).save(path)
    data = path.read_bytes()
    if damage in ("head", "column"):
        flip(path, 0 if damage == "head" else 100)
    elif damage != "none":
        path.write_bytes({"short": data[:-1], "long": data + b"\0", "tiny": data[:10]}[damage])
    else:
        path.unlink()
    with pytest.raises(UnknownThing if damage == "none" else Corrupt, match="warm the image again"):
        BlockIndex.load(path)
