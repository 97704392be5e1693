from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.chunks import collect
from haulier.chunks.manifest import Manifest
from haulier.chunks.packs import Pack, Writer
from haulier.chunks.store import ChunkStore
from haulier.errors import Conflict, UnknownThing
from haulier.units import CHUNK
from tests.chunks.samples import allocated, chunk, flip, name, open_files, place


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    with ChunkStore(tmp_path / "store", reserve=0, pack_size=16 * CHUNK) as opened:
        yield opened


@pytest.fixture
def other(store: ChunkStore) -> Iterator[ChunkStore]:
    with store.sibling() as opened:
        yield opened


def keep(store: ChunkStore, label: str, *seeds: int) -> None:
    for seed in seeds:
        store.put(chunk(seed))
    store.save_manifest(label, Manifest(len(seeds) * CHUNK, b"".join(map(name, seeds))))


def alive(store: ChunkStore, *seeds: int) -> list[int]:
    return [seed for seed in seeds if store.has(name(seed)) and store.get(name(seed)) == chunk(seed)]


def test_what_a_manifest_refers_to_stays(store: ChunkStore) -> None:
    keep(store, "a", 1, 2, 2)
    keep(store, "b", 2, 3)
    store.drop_manifest("a")
    report = store.gc()
    assert (report.chunks, report.bytes) == (1, CHUNK + 64)
    assert alive(store, 1, 2, 3) == [2, 3]
    store.drop_manifest("b")
    assert store.gc().chunks == 2
    assert store.stats().disk == 0
    assert store.check().ok


def test_a_dry_run_changes_nothing(store: ChunkStore) -> None:
    keep(store, "a", 1)
    store.add_lease("old")
    store.drop_manifest("a")
    report = store.gc(dry_run=True, lease_age_s=-1)
    assert (report.dry_run, report.chunks, report.bytes, report.leases) == (True, 1, CHUNK + 64, 1)
    assert alive(store, 1) == [1]
    assert store.leases() == ["old"]


def test_replacing_a_manifest_lets_its_chunks_go(store: ChunkStore) -> None:
    keep(store, "a", 1, 2)
    keep(store, "a", 2, 3)
    assert store.gc().chunks == 1
    assert alive(store, 1, 2, 3) == [2, 3]


def test_a_lease_keeps_chunks_until_it_is_dropped(store: ChunkStore, other: ChunkStore) -> None:
    store.put(chunk(1), lease="handoff/7")
    store.commit()
    assert other.gc().chunks == 0
    assert alive(other, 1) == [1]
    other.drop_lease("handoff/7")
    assert other.gc().chunks == 1


def test_an_old_lease_ends(store: ChunkStore) -> None:
    store.put(chunk(1), lease="handoff/7")
    store.commit()
    assert store.gc(lease_age_s=3600).leases == 0
    report = store.gc(lease_age_s=-1)
    assert (report.leases, report.chunks) == (1, 1)


def test_renewing_keeps_a_lease(store: ChunkStore) -> None:
    store.add_lease("a")
    with store.index.write() as db:
        db.execute("UPDATE leases SET renewed=renewed-7200")
    store.add_lease("a")
    assert store.gc(lease_age_s=3600).leases == 0


def test_asking_under_a_lease_keeps_what_is_there(store: ChunkStore, other: ChunkStore) -> None:
    keep(store, "a", 1, 2)
    store.put(chunk(3))
    assert store.missing([name(1), name(3), name(4)], lease="handoff/7") == [name(4)]
    other.drop_manifest("a")
    store.commit()
    assert other.gc().chunks == 1
    assert alive(store, 1, 2, 3) == [1, 3]


def test_what_is_put_without_a_lease_stays_while_its_store_is_open(store: ChunkStore, other: ChunkStore) -> None:
    other.put(chunk(1))
    other.commit()
    assert store.gc().chunks == 0
    assert alive(store, 1) == [1]
    other.close()
    assert store.gc().chunks == 1
    assert list((store.path / "open").iterdir()) == []


def test_a_store_that_died_keeps_nothing(store: ChunkStore) -> None:
    dead = store.sibling()
    dead.put(chunk(1))
    dead.commit()
    assert dead._own is not None
    os.close(dead._own[1])  # what the kernel does for a process that was killed
    dead._own = None
    assert store.gc().chunks == 1
    dead.close()


def test_saving_ends_the_need_for_an_open_store(store: ChunkStore) -> None:
    keep(store, "a", 1)
    store.drop_manifest("a")
    assert store.gc().chunks == 1


def test_chunks_put_again_between_a_collection_and_the_commit_are_kept(store: ChunkStore, other: ChunkStore) -> None:
    """They were here when they were put; the collection takes them; the commit must notice."""
    keep(store, "a", *range(5))
    other.drop_manifest("a")
    for n in range(3):
        other.put(chunk(n), lease="handoff/7")
    assert store.gc().chunks == 5
    other.commit()
    assert alive(store, *range(5)) == [0, 1, 2]
    assert store.gc().chunks == 0
    assert store.check().ok


def test_a_reader_with_an_old_place_does_not_get_the_hole(store: ChunkStore, other: ChunkStore) -> None:
    keep(store, "a", *range(8))
    keep(store, "b", 0, *range(2, 8))
    assert alive(other, *range(8)) == list(range(8))  # other remembers all places now
    store.drop_manifest("a")
    assert store.gc().chunks == 1
    with pytest.raises(UnknownThing):
        other.get(name(1))
    keep(store, "c", 1)
    assert other.read(name(1), 0, 4096) == chunk(1)[:4096]
    into = bytearray(4096)
    other.read_into(name(1), 4096, memoryview(into))
    assert into == chunk(1)[4096:8192]


def test_the_hole_comes_after_the_generation(
    store: ChunkStore, other: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the moment of each punch, no other process trusts the place any more."""
    keep(store, "a", *range(8))
    keep(store, "b", 0, *range(2, 8))
    assert alive(other, 1) == [1]
    store.drop_manifest("a")
    punched = []
    real = collect.punch

    def check_and_punch(pack: Pack, start: int, end: int) -> None:
        assert other.places.read(name(1), 0, 10) is None
        assert not other.has(name(1))
        punched.append((start, end))
        real(pack, start, end)

    monkeypatch.setattr(collect, "punch", check_and_punch)
    store.gc()
    assert punched


def test_space_comes_back_by_holes(store: ChunkStore) -> None:
    keep(store, "a", *range(12))
    keep(store, "b", *range(7), 11)
    store.drop_manifest("a")
    before = allocated(store.packs)
    report = store.gc()
    assert (report.chunks, report.compacted) == (4, 0)
    assert report.freed >= 4 * CHUNK - 8192
    assert allocated(store.packs) <= before - report.freed + 8192
    assert store.check().ok


def test_a_sparse_pack_is_compacted_and_old_readers_go_on(store: ChunkStore, other: ChunkStore) -> None:
    keep(store, "a", *range(16))
    keep(store, "b", 3, 9)
    assert alive(other, *range(16)) == list(range(16))
    old, _ = place(store, name(3))
    reader = Pack(store.packs, int(old.stem))
    store.drop_manifest("a")
    report = store.gc()
    assert (report.chunks, report.compacted, report.removed) == (14, 1, 1)
    assert not old.exists()
    assert place(store, name(3))[0] != old
    assert alive(other, 3, 9) == alive(store, 3, 9) == [3, 9]
    assert reader.size() > 0
    del reader
    assert not [file for file in open_files(store.packs) if file.endswith("(deleted)")]
    assert store.stats().disk < 3 * CHUNK
    assert store.check().ok


def test_a_pack_that_another_writes_is_punched_but_not_moved(store: ChunkStore, other: ChunkStore) -> None:
    for n in range(8):
        other.put(chunk(n), lease="first")
    other.commit()
    other.put(chunk(100), lease="second")
    other.commit()
    other.put(chunk(101), lease="second")  # appended, not committed
    store.drop_lease("first")
    report = store.gc()
    assert (report.chunks, report.removed) == (8, 0)
    assert report.freed > 7 * CHUNK
    other.commit()
    assert alive(store, 100, 101) == [100, 101]
    assert store.check().ok


def test_damage_met_while_compacting_loses_nothing_else(store: ChunkStore) -> None:
    keep(store, "a", *range(16))
    keep(store, "b", 3, 9)
    path, offset = place(store, name(3))
    flip(path, offset)
    store.drop_manifest("a")
    assert store.gc().compacted == 0
    assert store.check().corrupt == [name(3).hex()]
    assert alive(store, 9) == [9]


def test_small_packs_left_by_many_are_joined(store: ChunkStore) -> None:
    many = [store.sibling() for _ in range(4)]
    for n, one in enumerate(many):
        one.put(chunk(n), lease="work")
        one.put(chunk(n + 10), lease="junk")
        one.put(chunk(n + 20), lease="junk")
        one.commit()
    for one in many:
        one.close()
    store.drop_lease("junk")
    report = store.gc()
    assert (report.chunks, report.compacted) == (8, 4)
    assert store.stats().packs == 1
    assert alive(store, 0, 1, 2, 3) == [0, 1, 2, 3]


def test_one_collection_at_a_time(store: ChunkStore, other: ChunkStore) -> None:
    with collect.alone(other):
        with pytest.raises(Conflict, match="wait"):
            store.gc()
        with pytest.raises(Conflict):
            store.check()


def test_torn_tails_and_stray_files_go(store: ChunkStore, tmp_path: Path) -> None:
    keep(store, "a", 1)
    store.release_writer()
    path, _ = place(store, name(1))
    committed = path.stat().st_size
    with open(path, "ab") as file:
        file.write(chunk(2))
    stray = Writer.create(store.packs, 9999, store.id)
    assert stray is not None
    del stray
    store.gc()
    assert not (store.packs / "00009999.pack").exists()
    keep(store, "b", 3)
    assert path.stat().st_size == committed + CHUNK + 64
    assert alive(store, 1, 3) == [1, 3]


def test_check_finds_and_repairs_references(store: ChunkStore) -> None:
    keep(store, "a", 1, 2)
    with store.index.write() as db:
        db.execute("UPDATE refs SET count=7 WHERE fp=?", (name(1),))
        db.execute("DELETE FROM refs WHERE fp=?", (name(2),))
        db.execute("INSERT INTO refs VALUES (?,1)", (name(3),))
    report = store.check()
    assert (report.ok, report.wrong_references, report.repaired) == (False, 3, False)
    assert store.check(repair=True).repaired
    assert store.check().ok
    assert store.gc().chunks == 0


def test_check_names_what_is_corrupt_and_what_is_missing(store: ChunkStore) -> None:
    keep(store, "a", 1, 2, 3)
    path, offset = place(store, name(1))
    flip(path, offset + 5)
    with store.index.write() as db:
        db.execute("DELETE FROM chunks WHERE fp=?", (name(2),))
    report = store.check()
    assert report.chunks == 2
    assert (report.corrupt, report.missing) == ([name(1).hex()], [name(2).hex()])
    repaired = store.check(repair=True)
    assert repaired.missing == []  # its record was still in the pack
    assert alive(store, 1, 2, 3) == [2, 3]
    assert store.check().missing == [name(1).hex()]
    store.put(chunk(1), lease="work")
    store.commit()
    assert store.check().ok


def test_repair_finds_a_second_copy(store: ChunkStore, other: ChunkStore) -> None:
    store.put(chunk(1), lease="work")
    other.put(chunk(1), lease="work")
    store.commit()
    other.commit()
    path, offset = place(store, name(1))
    flip(path, offset + 5)
    assert store.check(repair=True).corrupt == [name(1).hex()]
    assert alive(store, 1) == [1]
    assert place(store, name(1))[0] != path


def test_a_lost_index_is_made_again_from_the_packs(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "s", pack_size=4 * CHUNK) as store:
        for n in range(10):
            store.put(chunk(n), lease="work")
        store.commit()
        damaged, offset = place(store, name(4))
    flip(damaged, offset + 1)
    for file in (tmp_path / "s").glob("index.sqlite*"):
        file.unlink()
    with ChunkStore(tmp_path / "s", pack_size=4 * CHUNK) as store:
        assert alive(store, *range(10)) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
        store.put(chunk(4), lease="work")
        store.put(chunk(11), lease="work")
        store.commit()
        assert store.check().ok
        assert alive(store, *range(12)) == [*range(10), 11]


def test_an_unpinned_manifest_keeps_nothing(store: ChunkStore) -> None:
    keep(store, "a", 1, 2)
    for seed in (2, 3):
        store.put(chunk(seed))
    store.save_manifest("b", Manifest(2 * CHUNK, name(2) + name(3)), pinned=False)
    store.release_writer()
    with store.sibling() as one:
        one.commit()
    assert not store.is_pinned("b") and store.is_pinned("a")
    report = store.gc()
    assert (report.chunks, alive(store, 1, 2, 3)) == (1, [1, 2])
    assert store.check().ok  # b lacks a chunk, and says so
    with pytest.raises(UnknownThing, match="needs 1 chunks"):
        store.save_manifest("guest", store.load_manifest("b"))


def test_pinning_and_letting_go(store: ChunkStore) -> None:
    keep(store, "a", 1, 2)
    store.pin_manifest("a", False)
    store.pin_manifest("a", False)
    assert store.gc(dry_run=True).chunks == 2
    store.pin_manifest("a", True)
    assert store.gc().chunks == 0
    keep(store, "a", 2, 3)  # pinned over pinned
    store.save_manifest("a", Manifest(CHUNK, name(3)), pinned=False)  # unpinned over pinned
    assert store.check().ok
    store.save_manifest("a", Manifest(CHUNK, name(3)))  # pinned over unpinned
    assert store.gc().chunks == 2 and alive(store, 1, 2, 3) == [3]
    store.drop_manifest("a")
    assert store.gc().chunks == 1
    with pytest.raises(UnknownThing):
        store.pin_manifest("a", True)
    with pytest.raises(UnknownThing):
        store.is_pinned("a")


def test_a_choice_is_respected_and_a_dry_run_is_exact(store: ChunkStore) -> None:
    keep(store, "gone", 1, 2, 3, 4)
    keep(store, "also", 4, 5)
    store.put(chunk(6), lease="old")
    store.commit()

    def choose(found: list[collect.Cached]) -> set[bytes]:
        return {row.fp for row in found} & {name(1), name(4), name(6), name(99)}

    told = [store.gc(dry_run=dry, leases=["old"], manifests=["gone", "none"], choose=choose) for dry in (True, False)]
    assert [(r.chunks, r.bytes, r.cached, r.cached_bytes) for r in told] == [
        (2, 2 * (CHUNK + 64), 2, 2 * (CHUNK + 64))
    ] * 2
    assert alive(store, *range(1, 7)) == [2, 3, 4, 5]
    assert store.leases() == [] and store.manifest_names() == ["also"]
    room = store.room()
    assert (room.chunks, room.cached_chunks) == (4, 2)
    assert (room.used, room.cached) == (4 * (CHUNK + 64), 2 * (CHUNK + 64))


def test_what_is_pinned_while_the_choice_is_made_stays(store: ChunkStore, other: ChunkStore) -> None:
    keep(store, "a", 1, 2)
    store.drop_manifest("a")

    def choose(found: list[collect.Cached]) -> list[bytes]:
        other.missing([name(1)], lease="handoff/7")
        return [row.fp for row in found]

    assert store.gc(choose=choose).chunks == 1
    assert alive(store, 1, 2) == [1]


def test_uses_are_counted(store: ChunkStore, other: ChunkStore) -> None:
    keep(store, "a", 1, 2)
    with store.index.write() as db:
        db.execute("UPDATE chunks SET came=came-1000, used=used-1000")
    assert store.missing([name(1), name(9)], lease="handoff/7") == [name(9)]
    store.touch([name(1), name(9), name(3)])
    store.flush_uses()
    other.touch([name(1)])
    other.close()  # so soon after that it is the same use

    def facts() -> dict[bytes, tuple[int, int]]:
        with store.index.read() as db:
            return {
                fp: (hits, used - came) for fp, hits, used, came in db.execute("SELECT fp,hits,used,came FROM chunks")
            }

    assert facts()[name(1)][0] == 1 and facts()[name(1)][1] >= 1000
    assert facts()[name(2)] == (0, 0)


def test_a_store_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "s", reserve=0) as store:
        keep(store, "a", 1, 2)
    db = sqlite3.connect(tmp_path / "s" / "index.sqlite")
    for column in ("came", "used", "hits", "queue"):
        db.execute(f"ALTER TABLE chunks DROP COLUMN {column}")
    db.execute("ALTER TABLE manifests DROP COLUMN pinned")
    db.executescript("DROP TABLE ghosts; DROP TABLE notes; PRAGMA user_version=1")
    db.close()
    with ChunkStore(tmp_path / "s", reserve=0) as store:
        assert store.check().ok and alive(store, 1, 2) == [1, 2] and store.is_pinned("a")
        keep(store, "b", 3)
        store.drop_manifest("a")
        assert store.gc().chunks == 2


def test_what_a_dead_writer_did_not_commit_goes(store: ChunkStore) -> None:
    keep(store, "a", 1, 2)
    store.release_writer()
    path, _ = place(store, name(1))
    committed = path.stat().st_size
    with open(path, "ab") as file:
        file.write(chunk(3))
    store.gc()
    assert path.stat().st_size == committed
    store.put(chunk(4), lease="work")  # this one is being written
    size = path.stat().st_size
    store.gc(choose=lambda found: ())
    store.commit()
    assert path.stat().st_size >= size > committed
    assert alive(store, 1, 2, 4) == [1, 2, 4]
