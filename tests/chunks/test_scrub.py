"""Reading chunks again: flipped bits are found, and never given to anybody."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.chunks.manifest import Manifest
from haulier.chunks.scrub import Bad, Pass, condemn, lacking, read_pass, scrub_step, write_pass
from haulier.chunks.store import ChunkStore
from haulier.errors import Conflict, Corrupt, HaulierError, UnknownThing
from haulier.units import CHUNK
from tests.chunks.samples import chunk, fail_at, flip, name, place


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    with ChunkStore(tmp_path / "store", reserve=0, pack_size=4 * CHUNK) as opened:
        yield opened


def keep(store: ChunkStore, label: str, seeds: range) -> None:
    for seed in seeds:
        store.put(chunk(seed))
    store.save_manifest(label, Manifest(len(seeds) * CHUNK, b"".join(map(name, seeds))))


def whole_pass(store: ChunkStore, most: int) -> tuple[Pass, list[Bad], int]:
    state, bad, steps = Pass(), list[Bad](), 0
    while True:
        step = scrub_step(store, state, most, now=100.0 + steps)
        bad += step.bad
        steps += 1
        if step.done:
            return state, bad, steps


@pytest.mark.parametrize("most", [1, 3 * CHUNK, 1 << 30])
def test_a_pass_reads_everything_once_however_it_is_cut(store: ChunkStore, most: int) -> None:
    keep(store, "a", range(11))
    state, bad, steps = whole_pass(store, most)
    assert (state.chunks, state.bytes, bad) == (11, 11 * (CHUNK + 64), [])
    assert (state.begun, state.ended) == (0.0, 99.0 + steps)
    assert steps == {1: 12, 3 * CHUNK: 4, 1 << 30: 1}[most]


@pytest.mark.parametrize("where", [-64, -63, -20, 0, CHUNK - 1])
def test_every_kind_of_damage_is_found(store: ChunkStore, where: int) -> None:
    """In the header (its magic, so that no walker would find the record), in its check, in the payload."""
    keep(store, "a", range(8))
    path, offset = place(store, name(5))
    store.get(name(5))  # known to be good, once
    flip(path, offset + where)
    _, bad, _ = whole_pass(store, CHUNK)
    assert [each.fp for each in bad] == [name(5)]
    assert condemn(store, bad) == [name(5)] == lacking(store)
    with pytest.raises(UnknownThing):
        store.get(name(5))
    store.put(chunk(5), lease="heal")
    store.commit()
    assert lacking(store) == [] and store.check().ok and store.get(name(5)) == chunk(5)


@pytest.mark.parametrize("finder", ["scrub", "read", "repair"])
def test_manifests_that_name_a_lost_chunk_are_not_complete_until_it_is_back(store: ChunkStore, finder: str) -> None:
    keep(store, "a", range(4))
    keep(store, "cached", range(2, 5))
    keep(store, "other", range(4, 6))
    store.pin_manifest("cached", False)
    path, offset = place(store, name(3))
    flip(path, offset)
    if finder == "scrub":
        condemn(store, whole_pass(store, 1 << 30)[1])
    elif finder == "read":
        with store.sibling() as cold, pytest.raises(Corrupt):
            cold.get(name(3))
    else:
        assert store.check(repair=True).corrupt == [name(3).hex()]
    assert [store.is_complete(label) for label in ("a", "cached", "other")] == [False, False, True]
    assert lacking(store) == [name(3)]  # still missed, and healed
    with pytest.raises(UnknownThing, match="needs 1 chunks"):
        store.save_manifest("a", store.load_manifest("a"))
    store.put(chunk(3), lease="heal")
    assert not store.is_complete("a")  # not durable yet
    store.commit()
    assert [store.is_complete(label) for label in ("a", "other")] == [True, True]
    assert lacking(store) == [] and store.check().ok


def test_a_pack_that_is_gone_is_found(store: ChunkStore) -> None:
    keep(store, "a", range(8))
    path, _ = place(store, name(0))
    path.unlink()
    _, bad, _ = whole_pass(store, 1 << 30)
    lost = condemn(store, bad)
    assert name(0) in lost and lost == sorted(lost, key=lost.index)
    assert set(lacking(store)) == set(lost)


@pytest.mark.parametrize("call", ["open", "pread"])
def test_packs_that_cannot_be_read_just_now_are_not_damage(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    keep(store, "a", range(8))
    with monkeypatch.context() as patch:
        fail_at(patch, call, errno.EMFILE)
        with pytest.raises(HaulierError, match="nothing of it is given up"):
            whole_pass(store, 1 << 30)
    state, bad, _ = whole_pass(store, 1 << 30)
    assert (state.chunks, bad) == (8, [])


def test_what_the_disk_fails_to_read_twice_is_damage(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(store, "a", range(3))
    with monkeypatch.context() as patch:
        fail_at(patch, "pread", errno.EIO, times=1)
        assert whole_pass(store, 1 << 30)[1] == []
    with monkeypatch.context() as patch:
        fail_at(patch, "pread", errno.EIO)
        bad = whole_pass(store, 1 << 30)[1]
        assert set(condemn(store, bad)) == {name(seed) for seed in range(3)}


def test_another_copy_in_the_packs_is_used(store: ChunkStore) -> None:
    with store.sibling() as other:
        store.put(chunk(1), lease="work")
        other.put(chunk(1), lease="work")
        store.commit()
        other.commit()
    path, offset = place(store, name(1))
    flip(path, offset)
    _, bad, _ = whole_pass(store, 1 << 30)
    store.save_manifest("a", Manifest(CHUNK, name(1)))
    assert condemn(store, bad) == [] and store.is_complete("a")
    assert store.get(name(1)) == chunk(1) and place(store, name(1))[0] != path


def test_a_reader_does_not_go_on_reading_what_was_condemned(store: ChunkStore) -> None:
    keep(store, "a", range(3))
    with store.sibling() as other:
        assert other.get(name(1)) == chunk(1)
        path, offset = place(store, name(1))
        flip(path, offset)
        assert other.read(name(1), 0, 10) != chunk(1)[:10]  # checked when it was read first, not since
        condemn(store, whole_pass(store, 1 << 30)[1])
        with pytest.raises(UnknownThing):
            other.read(name(1), 0, 10)


def test_what_a_collection_moves_or_takes_meanwhile_is_not_damage(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(store, "a", range(8))
    keep(store, "b", range(3, 4))
    store.drop_manifest("a")
    real, collected = os.posix_fadvise, []

    def collect_first(fd: int, offset: int, length: int, advice: int) -> None:
        if not collected:
            collected.append(store.gc())
        real(fd, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", collect_first)
    _, bad, _ = whole_pass(store, 1 << 30)
    assert bad == [] and collected[0].chunks == 7
    assert store.check().ok


def test_a_pass_goes_on_after_a_restart(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "s", reserve=0, pack_size=4 * CHUNK) as store:
        keep(store, "a", range(9))
        state = read_pass(store)
        scrub_step(store, state, 3 * CHUNK, now=5.0)
        write_pass(store, state)
    with ChunkStore(tmp_path / "s", reserve=0) as store:
        state = read_pass(store)
        assert (state.chunks, state.begun) == (3, 5.0)
        assert scrub_step(store, state, 1 << 30, now=6.0).chunks == 6
        assert (state.chunks, state.ended) == (9, 6.0)
        scrub_step(store, state, 1, now=7.0)  # the next pass counts anew
        assert state.chunks == 1
        with store.index.write() as db:
            db.execute("UPDATE notes SET value='nonsense'")
        assert read_pass(store) == Pass()


def test_an_empty_store_and_a_busy_one(store: ChunkStore) -> None:
    from haulier.chunks.collect import alone

    assert whole_pass(store, 10)[0].chunks == 0
    assert condemn(store, []) == []
    keep(store, "a", range(1))
    path, offset = place(store, name(0))
    flip(path, offset)
    _, bad, _ = whole_pass(store, 10)
    with alone(store), pytest.raises(Conflict):
        condemn(store, bad)


def test_what_is_only_cached_is_not_lacking(store: ChunkStore) -> None:
    keep(store, "a", range(3))
    store.pin_manifest("a", False)
    path, offset = place(store, name(1))
    flip(path, offset)
    assert condemn(store, whole_pass(store, 1 << 30)[1]) == [name(1)]
    assert lacking(store) == [] and store.check().ok
