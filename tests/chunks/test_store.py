from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from haulier.chunks.fingerprint import ZERO, ZERO_CHUNK
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import Conflict, Corrupt, HaulierError, NoRoom, UnknownThing, UsageError
from haulier.units import CHUNK
from tests.chunks.samples import chunk, fail_at, flip, name, open_packs, place, soft_chunk


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    with ChunkStore(tmp_path / "store", reserve=0) as opened:
        yield opened


@pytest.fixture
def other(store: ChunkStore) -> Iterator[ChunkStore]:
    """The same store in another process, as far as locks and memory go."""
    with store.sibling() as opened:
        yield opened


def manifest_of(*seeds: int) -> Manifest:
    return Manifest(len(seeds) * CHUNK, b"".join(name(seed) for seed in seeds))


def test_what_is_put_comes_back(store: ChunkStore) -> None:
    fp = store.put(chunk(1))
    assert fp == name(1)
    assert store.has(fp)
    assert store.get(fp) == chunk(1)
    store.commit()
    assert store.get(fp) == chunk(1)
    assert store.read(fp, 4096, 8192) == chunk(1)[4096 : 4096 + 8192]
    into = bytearray(100)
    store.read_into(fp, 50, memoryview(into))
    assert into == chunk(1)[50:150]


def test_it_survives_reopening(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "s") as store:
        store.put(chunk(1), lease="work")
    with ChunkStore(tmp_path / "s", create=False) as store:
        assert store.get(name(1)) == chunk(1)


def test_zero_is_always_there_and_never_stored(store: ChunkStore) -> None:
    assert store.put(ZERO_CHUNK) == ZERO
    assert store.has(ZERO)
    assert store.missing([ZERO]) == []
    assert store.read(ZERO, 100, 200) == bytes(200)
    into = bytearray(b"x" * 10)
    store.read_into(ZERO, 0, memoryview(into))
    assert into == bytes(10)
    store.commit()
    assert store.stats().chunks == 0


def test_missing_names_each_once_in_order(store: ChunkStore) -> None:
    store.put(chunk(1))
    store.commit()
    store.put(chunk(2))
    assert store.missing([name(5), name(1), name(4), name(5), name(2)]) == [name(5), name(4)]
    many = [n.to_bytes(32, "big") for n in range(3000)]
    assert store.missing([*many, name(1)]) == many


def test_putting_twice_stores_once(store: ChunkStore, other: ChunkStore) -> None:
    for _ in range(2):
        store.put(chunk(1))
    store.commit()
    store.put(chunk(1))
    other.put(chunk(1))
    other.commit()
    store.commit()
    stats = store.stats()
    assert (stats.chunks, stats.bytes, stats.stored) == (1, CHUNK, CHUNK)


def test_a_chunk_that_is_not_what_it_is_called_is_refused(store: ChunkStore) -> None:
    with pytest.raises(Corrupt, match="ask for it again"):
        store.put(chunk(1), name(2))
    assert not store.has(name(1))
    assert not store.has(name(2))
    assert store.put(chunk(1), name(1)) == name(1)


@pytest.mark.parametrize("size", [0, CHUNK - 1, CHUNK + 1])
def test_a_chunk_has_one_size(store: ChunkStore, size: int) -> None:
    with pytest.raises(UsageError):
        store.put(bytes(size))


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, CHUNK + 1), (CHUNK, 1), (5, -1)])
def test_reads_stay_within_the_chunk(store: ChunkStore, offset: int, length: int) -> None:
    fp = store.put(chunk(1))
    for _ in range(2):
        with pytest.raises(UsageError):
            store.read(fp, offset, length)
        store.get(fp)
    with pytest.raises(UsageError):
        store.read_into(fp, CHUNK - 5, memoryview(bytearray(6)))


def test_an_unknown_chunk_is_said_to_be_unknown(store: ChunkStore) -> None:
    with pytest.raises(UnknownThing, match="fetch it from another site"):
        store.get(name(1))


def test_no_store_is_made_when_not_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UnknownThing, match="no chunk store"):
        ChunkStore(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()


def test_others_see_what_was_committed_and_nothing_else(store: ChunkStore, other: ChunkStore) -> None:
    assert not other.has(name(1))
    store.put(chunk(1))
    assert not other.has(name(1))
    store.commit()
    assert other.has(name(1))
    assert other.get(name(1)) == chunk(1)


def test_another_process_sees_it_too(store: ChunkStore) -> None:
    store.put(chunk(1))
    store.commit()
    script = (
        "import sys; from pathlib import Path; from haulier.chunks.store import ChunkStore\n"
        "with ChunkStore(Path(sys.argv[1]), create=False) as s:\n"
        "    s.put(s.get(bytes.fromhex(sys.argv[2]))[::-1], lease='theirs')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(store.path), name(1).hex()], check=True, timeout=30)
    assert store.get(store.put(chunk(1)[::-1])) == chunk(1)[::-1]
    assert store.stats().chunks == 2


def test_writers_have_packs_of_their_own(store: ChunkStore, other: ChunkStore) -> None:
    for n in range(4):
        (store, other)[n % 2].put(chunk(n))
    store.commit()
    other.commit()
    packs = {place(store, name(n))[0] for n in (0, 2)}, {place(store, name(n))[0] for n in (1, 3)}
    assert len(packs[0]) == len(packs[1]) == 1
    assert packs[0] != packs[1]


def test_a_pack_left_by_one_is_continued_by_the_next(tmp_path: Path) -> None:
    for n in range(3):
        with ChunkStore(tmp_path / "s") as store:
            store.put(chunk(n), lease="work")
    assert len(list((tmp_path / "s" / "packs").iterdir())) == 1


def test_packs_are_closed_when_full(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "s", pack_size=4 * CHUNK) as store:
        for n in range(20):
            store.put(chunk(n))
        store.commit()
        assert len(list(store.packs.iterdir())) == 5
        assert [store.get(name(n)) for n in range(20)] == [chunk(n) for n in range(20)]
        assert store.check().ok


def test_compressed_chunks_come_back(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "s", zstd_level=3) as store:
        for n in range(3):
            store.put(soft_chunk(n))
        store.put(chunk(9))
        store.commit()
        assert store.stats().stored < 2 * CHUNK
    with ChunkStore(tmp_path / "s") as store:
        for n in range(3):
            data = soft_chunk(n)
            fp = store.put(data)
            assert store.read(fp, 10, 100) == data[10:110]
            assert store.read(fp, 100, 100) == data[100:200]
            into = bytearray(7)
            store.read_into(fp, 3, memoryview(into))
            assert into == data[3:10]
        assert store.get(name(9)) == chunk(9)


def test_damage_is_found_at_the_first_read_and_the_chunk_dropped(store: ChunkStore, other: ChunkStore) -> None:
    store.put(chunk(1), lease="work")
    store.commit()
    path, offset = place(store, name(1))
    flip(path, offset + 1000)
    with pytest.raises(Corrupt, match="dropped"):
        other.read(name(1), 0, 10)
    assert not store.has(name(1))
    with pytest.raises(UnknownThing):
        other.get(name(1))
    store.put(chunk(1), lease="work")
    store.commit()
    assert other.get(name(1)) == chunk(1)


def test_damage_before_the_commit_is_found_too(store: ChunkStore) -> None:
    store.put(chunk(1))
    pack = next(store.packs.iterdir())
    flip(pack, 64 + 64 + 5)
    with pytest.raises(Corrupt):
        store.get(name(1))
    assert not store.has(name(1))


@pytest.mark.parametrize("cut", ["truncated", "removed"])
def test_a_lost_pack_is_corrupt_not_fatal(store: ChunkStore, other: ChunkStore, cut: str) -> None:
    store.put(chunk(1))
    store.commit()
    path, offset = place(store, name(1))
    if cut == "removed":
        path.unlink()
    else:
        os.truncate(path, offset + 100)
    with pytest.raises(Corrupt):
        other.get(name(1))


@pytest.mark.parametrize("call", ["open", "pread"])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES])
def test_a_chunk_that_cannot_be_read_just_now_is_kept(
    store: ChunkStore, other: ChunkStore, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    store.put(chunk(1), lease="work")
    store.commit()
    with monkeypatch.context() as patch:
        fail_at(patch, call, number)
        with pytest.raises(HaulierError, match="nothing of it is given up") as raised:
            other.get(name(1))
        assert type(raised.value) is HaulierError
        with pytest.raises(HaulierError, match="nothing of it is given up"):
            other.check(repair=True)
    assert store.has(name(1))
    assert other.get(name(1)) == chunk(1) and other.check().ok


@pytest.mark.parametrize("call", ["open", "pread"])
def test_a_disk_that_fails_once_is_read_again_and_one_that_fails_twice_is_believed(
    store: ChunkStore, other: ChunkStore, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store.put(chunk(1), lease="work")
    store.commit()
    with monkeypatch.context() as patch:
        fail_at(patch, call, errno.EIO, times=1)
        assert other.get(name(1)) == chunk(1)
    with store.sibling() as cold, monkeypatch.context() as patch:
        fail_at(patch, call, errno.EIO)
        with pytest.raises(Corrupt, match="dropped"):
            cold.get(name(1))
    assert not store.has(name(1))


def test_scattered_reads_keep_a_bounded_number_of_packs_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("haulier.chunks.places._PACKS_MOST", 8)
    with ChunkStore(tmp_path / "s", reserve=0, pack_size=1) as store:
        for n in range(40):
            store.put(chunk(n), lease="work")
            store.commit()
    with ChunkStore(tmp_path / "s", reserve=0) as store:
        for _ in range(2):
            for n in range(40):
                assert store.get(name(n)) == chunk(n)
                into = bytearray(100)
                store.read_into(name(n), 50, memoryview(into))
                assert into == chunk(n)[50:150]
                assert store.read_now(name(n), 0, 10) in (None, chunk(n)[:10])
        assert open_packs(store) <= 8


def test_a_chunk_checked_once_is_not_checked_again(store: ChunkStore, other: ChunkStore) -> None:
    """The price of fast reads: this process trusts what it has seen. check() reads everything."""
    store.put(chunk(1), lease="work")
    store.commit()
    assert other.get(name(1)) == chunk(1)
    path, offset = place(store, name(1))
    flip(path, offset)
    assert other.get(name(1)) != chunk(1)
    assert store.check().corrupt == [name(1).hex()]


def test_manifests_are_kept_by_name(store: ChunkStore, other: ChunkStore) -> None:
    for n in range(3):
        store.put(chunk(n))
    store.save_manifest("image/a", manifest_of(0, 1), {"os": "debian", "n": 1})
    store.save_manifest("guest/b", manifest_of(1, 2))
    assert other.load_manifest("image/a") == manifest_of(0, 1)
    assert other.manifest_meta("image/a") == {"os": "debian", "n": 1}
    assert other.manifest_meta("guest/b") == {}
    assert other.manifest_names() == ["guest/b", "image/a"]
    assert other.manifest_names("image/") == ["image/a"]
    other.save_manifest("image/a", manifest_of(2), {"n": 2})
    assert store.load_manifest("image/a") == manifest_of(2)
    assert store.manifest_meta("image/a") == {"n": 2}
    store.drop_manifest("image/a")
    for call in (other.load_manifest, other.manifest_meta, other.drop_manifest):
        with pytest.raises(UnknownThing, match="no manifest image/a"):
            call("image/a")
    assert store.check().ok


def test_a_manifest_needs_its_chunks(store: ChunkStore) -> None:
    store.put(chunk(1))
    with pytest.raises(UnknownThing, match="needs 1 chunks"):
        store.save_manifest("m", manifest_of(1, 2))
    assert store.manifest_names() == []
    store.save_manifest("m", manifest_of(1, 2), partial=True)
    assert store.check().ok
    store.put(chunk(2))
    store.commit()
    store.save_manifest("m", manifest_of(2))
    assert store.gc().chunks == 1


def test_a_chunk_of_a_partial_manifest_is_kept_once_it_comes(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "s") as store:
        store.save_manifest("m", manifest_of(1, 2), partial=True)
    with ChunkStore(tmp_path / "s") as store:
        store.put(chunk(1))
    with ChunkStore(tmp_path / "s") as store:
        assert store.gc().chunks == 0
        assert store.get(name(1)) == chunk(1)


@pytest.mark.parametrize("bad", ["", "/a", "../x", "a b", "ä", "x" * 201, "a\n"])
def test_names_are_checked(store: ChunkStore, bad: str) -> None:
    with pytest.raises(UsageError):
        store.save_manifest(bad, manifest_of(1))
    if bad:
        with pytest.raises(UsageError):
            store.put(chunk(1), lease=bad)
    with pytest.raises(UsageError):
        store.add_lease(bad)


def test_the_names_of_our_own_leases_are_not_for_others(store: ChunkStore) -> None:
    with pytest.raises(UsageError):
        store.add_lease("open:1234")


def test_a_damaged_manifest_is_named(store: ChunkStore, other: ChunkStore) -> None:
    store.put(chunk(1))
    store.save_manifest("image/a", manifest_of(1))
    with store.index.write() as db:
        db.execute("UPDATE manifests SET data=substr(data, 1, 40)")
    with pytest.raises(Corrupt, match="manifest image/a"):
        other.load_manifest("image/a")
    assert other.check().damaged_manifests == ["image/a"]


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path / "s")
    store.put(chunk(1))
    store.close()
    store.close()
    for call in (lambda: store.put(chunk(2)), lambda: store.get(name(1)), lambda: store.has(name(1))):
        with pytest.raises(UsageError):
            call()


def test_an_exception_in_the_block_commits_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        with ChunkStore(tmp_path / "s") as store:
            store.put(chunk(1), lease="work")
            1 / 0  # noqa: B018
    with ChunkStore(tmp_path / "s") as store:
        assert not store.has(name(1))
        assert store.leases() == []


def test_leases_are_listed_and_end(store: ChunkStore, other: ChunkStore) -> None:
    store.add_lease("handoff/1")
    store.put(chunk(1), lease="handoff/2")
    store.put(chunk(2))
    store.commit()
    assert other.leases() == ["handoff/1", "handoff/2"]
    other.drop_lease("handoff/1")
    other.drop_lease("never-was")
    assert store.leases() == ["handoff/2"]
    assert store.stats().leases == 1


def test_the_pack_is_synced_before_the_index_commits(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: dict[int, int] = {}
    real = os.fdatasync
    commits = []

    def note(fd: int) -> None:
        size = os.fstat(fd).st_size
        real(fd)
        synced[os.fstat(fd).st_ino] = size

    def at_commit(statement: str) -> None:
        if statement == "COMMIT":
            for file in store.packs.iterdir():
                commits.append((synced.get(file.stat().st_ino, 0), file.stat().st_size))

    for n in range(3):
        store.put(chunk(n))
    monkeypatch.setattr(os, "fdatasync", note)
    store.index._writer.set_trace_callback(at_commit)
    store.commit()
    assert commits
    assert all(done == size for done, size in commits)


@pytest.mark.parametrize("number", [5, 28])
def test_a_failed_sync_keeps_nothing_and_says_so(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store.put(chunk(1), lease="work")
    store.commit()
    store.put(chunk(2), lease="work")

    def fail(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(NoRoom if number == 28 else Corrupt):
            store.commit()
    assert not store.has(name(2))
    assert store.get(name(1)) == chunk(1)
    store.put(chunk(3), lease="work")
    store.put(chunk(2), lease="work")
    store.commit()
    assert [store.get(name(n)) for n in (1, 2, 3)] == [chunk(n) for n in (1, 2, 3)]
    assert store.check().ok


def test_put_leaves_room_for_the_index(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "s", reserve=1 << 60) as store:
        with pytest.raises(NoRoom, match="haulier gc"):
            store.put(chunk(1))


def test_a_store_of_another_version_is_refused(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "s") as store:
        with store.index.write() as db:
            db.execute("PRAGMA user_version=7")
    with pytest.raises(Corrupt, match="version 7"):
        ChunkStore(tmp_path / "s")


def test_an_index_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "index.sqlite").write_bytes(b"nonsense" * 1000)
    with pytest.raises(Corrupt, match="damaged"):
        ChunkStore(tmp_path / "s")


def test_a_store_that_stays_locked_says_so(store: ChunkStore, other: ChunkStore) -> None:
    other.index._writer.execute("PRAGMA busy_timeout=10")
    other.put(chunk(1), lease="work")
    with store.index.write():
        with pytest.raises(Conflict, match="locked"):
            other.commit()
    other.commit()
    assert store.has(name(1))


def test_what_was_put_again_and_then_collected_can_be_read_before_the_commit(
    store: ChunkStore, other: ChunkStore
) -> None:
    store.put(chunk(1), lease="work")
    store.commit()
    store.put(chunk(1), lease="more")
    other.drop_lease("work")
    assert other.gc().chunks == 1
    assert store.get(name(1)) == chunk(1)
    store.commit()
    assert other.get(name(1)) == chunk(1)


def test_what_is_put_again_while_a_commit_appends_is_looked_for_as_well(
    store: ChunkStore, other: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in (1, 2):
        store.put(chunk(n), lease="work")
    store.commit()
    store.put(chunk(1), lease="more")
    sync, late = store._sync, [chunk(2)]

    def put_meanwhile(batch: Any) -> None:
        sync(batch)
        if late:
            store.put(late.pop(), lease="more")
            other.drop_lease("work")
            assert other.gc().chunks == 2

    monkeypatch.setattr(store, "_sync", put_meanwhile)
    store.commit()
    store.commit()
    assert [other.get(name(n)) for n in (1, 2)] == [chunk(1), chunk(2)]


def test_a_commit_that_appends_does_not_lock_out_a_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both need the pack being written and the index: in the same order."""
    store = ChunkStore(tmp_path / "s", reserve=0)
    store.put(chunk(1), lease="work")
    store.release_writer()
    store.put(chunk(1), lease="more")
    with store.sibling() as other:
        other.drop_lease("work")
        assert other.gc().chunks == 1
    in_put, wanted = threading.Event(), threading.Event()
    lock, sync, new_writer = store._append_lock, store._sync, store.new_writer

    class Watched:
        """The lock of what is appended: says when the commit wants it while the put has it."""

        def __enter__(self) -> None:
            if threading.current_thread() is committing and in_put.is_set():
                wanted.set()
            lock.acquire()

        def __exit__(self, *exc: object) -> None:
            lock.release()

    def sync_then_let_put(batch: Any) -> None:
        sync(batch)
        if not in_put.is_set():
            putting.start()
            assert in_put.wait(30)

    def make_when_wanted(**how: bool) -> Any:
        if threading.current_thread() is putting:
            in_put.set()
            assert wanted.wait(30)
        return new_writer(**how)

    monkeypatch.setattr(store, "_append_lock", Watched())
    monkeypatch.setattr(store, "_sync", sync_then_let_put)
    monkeypatch.setattr(store, "new_writer", make_when_wanted)
    committing = threading.Thread(target=store.commit, daemon=True)
    putting = threading.Thread(target=store.put, args=(chunk(2), None, "more"), daemon=True)
    committing.start()
    committing.join(30)
    assert not committing.is_alive()
    putting.join(30)
    assert not putting.is_alive()
    store.close()
    with ChunkStore(tmp_path / "s", reserve=0) as fresh:
        assert [fresh.get(name(n)) for n in (1, 2)] == [chunk(1), chunk(2)]


def test_threads_may_put_read_and_commit_at_once(store: ChunkStore) -> None:
    failures: list[BaseException] = []

    def work(part: int) -> None:
        try:
            for n in range(30):
                seed = part // 2 * 1000 + n  # two threads put the same
                store.put(chunk(seed), lease=f"part/{part}")
                if n % 7 == part:
                    store.commit()
                assert store.get(name(seed)) == chunk(seed)
            store.commit()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert store.check().ok
    assert store.stats().chunks == 60
    assert store.gc().chunks == 0
