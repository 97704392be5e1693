from __future__ import annotations

import gc
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.chunks.images import import_image
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import NoRoom
from haulier.units import CHUNK, MIB
from tests.chunks.samples import chunk, name

pytestmark = pytest.mark.root


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB."""
    where = tmp_path / "chunks-small"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "haulier-chunks", str(where)], check=True)
    try:
        yield where
    finally:
        # An error keeps the statement that it came from, and that keeps the database open.
        gc.collect()
        subprocess.run(["umount", str(where)], check=True)


def fill(where: Path) -> Path:
    """A file that takes what is left."""
    ballast = where / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass
        try:
            while file.write(bytes(512)):
                pass
        except OSError:
            pass
    return ballast


def put_until_full(store: ChunkStore, lease: str = "work") -> int:
    for n in range(1000):
        try:
            store.put(chunk(n), lease=lease)
        except NoRoom:
            return n
    raise AssertionError("the disk never filled up")


@pytest.mark.parametrize("reserve", [0, 4 * MIB])
def test_a_full_disk_loses_nothing(small_disk: Path, reserve: int) -> None:
    with ChunkStore(small_disk / "s", reserve=reserve) as store:
        for n in range(1000, 1010):
            store.put(chunk(n))
        store.save_manifest("a", Manifest(10 * CHUNK, b"".join(map(name, range(1000, 1010)))))
        count = put_until_full(store)
        assert count > 100
        for n in range(count):
            assert store.get(name(n)) == chunk(n)
        if reserve:
            store.commit()
        else:
            with pytest.raises(NoRoom):
                store.put(chunk(5000))
    with ChunkStore(small_disk / "s", reserve=reserve) as store:
        assert store.check().ok
        assert list(store.load_manifest("a")) == [name(n) for n in range(1000, 1010)]
        assert all(store.has(name(n)) for n in range(count))
        store.drop_lease("work")
        assert store.gc().freed > (count - 5) * CHUNK
        assert put_until_full(store) >= count - 130


def test_no_room_for_the_index_keeps_the_batch(small_disk: Path) -> None:
    with ChunkStore(small_disk / "s", reserve=0) as store:
        for n in range(20):
            store.put(chunk(n), lease="work")
        ballast = fill(small_disk)
        raised = False
        try:
            for turn in range(200):
                store.commit()  # the first ones may fit into what the index has already
                store.add_lease(f"lease-{turn}-" + "x" * 180)
        except NoRoom:
            raised = True
        assert raised
        assert all(store.get(name(n)) == chunk(n) for n in range(20))
        ballast.unlink()
        store.commit()
        assert store.check().ok
    with ChunkStore(small_disk / "s", reserve=0) as store:
        assert all(store.has(name(n)) for n in range(20))


def test_compaction_without_room_still_gives_space_back(small_disk: Path) -> None:
    with ChunkStore(small_disk / "s", reserve=0) as store:
        for n in range(200):
            store.put(chunk(n), lease="keep" if n % 3 == 0 else "junk")
        store.commit()
        store.drop_lease("junk")
        ballast = fill(small_disk)
        with open(ballast, "r+b") as file:
            file.truncate(ballast.stat().st_size - 2 * MIB)  # room for the index, not for moving chunks
        report = store.gc()
        assert report.chunks == 133
        assert report.freed > 120 * CHUNK
        assert all(store.get(name(n)) == chunk(n) for n in range(0, 200, 3))
        assert store.check().ok


def test_an_import_that_does_not_fit_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    image = tmp_path / "big.raw"
    image.write_bytes(b"".join(chunk(n) for n in range(500)))
    with ChunkStore(small_disk / "s", reserve=MIB) as store:
        with pytest.raises(NoRoom, match="free some space"):
            import_image(store, "big", image)
        assert store.manifest_names() == []
        store.gc()
        assert store.stats().chunks == 0
        assert store.stats().disk == 0


def test_a_qcow2_that_does_not_fit_unpacked_says_so(small_disk: Path, tmp_path: Path) -> None:
    raw, image = tmp_path / "big.raw", tmp_path / "big.qcow2"
    raw.write_bytes(b"".join(chunk(n) for n in range(500)))
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(image)], check=True)
    with ChunkStore(small_disk / "s", reserve=MIB) as store:
        with pytest.raises(NoRoom, match="unpack"):
            import_image(store, "big", image)
        assert store.manifest_names() == []
