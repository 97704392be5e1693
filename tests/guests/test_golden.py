"""The files of golden snapshots: what is believed about them and what is not. (System tests make real ones.)"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from haulier.chunks.fingerprint import ZERO
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import Corrupt, UnknownThing
from haulier.guests import golden_scrub
from haulier.guests.golden import (
    Golden,
    block_fingerprints,
    clear_unfinished,
    find_golden,
    list_goldens,
)
from haulier.units import CHUNK
from tests.support.goldens import decay, meta, put, snapshot


def test_the_id_is_of_contents_and_machine_alone() -> None:
    same = {meta().id, meta(created=2000.0).id, meta(qemu="11.0.0").id, meta(memory_size=2000).id}
    assert same == {meta().id}
    changes: list[dict[str, object]] = [
        {"manifest": "44" * 32},
        {"memory": "44" * 32},
        {"memory_mib": 512},
        {"vcpus": 2},
        {"machine": "pc-q35-9.0"},
        {"cpu": "Westmere-v1"},
        {"accel": "kvm"},
        {"free_page_hint": True},
        {"disk_size": 8 << 30},
    ]
    assert len({meta(**change).id for change in changes} | same) == len(changes) + 1


def test_what_is_found(tmp_path: Path) -> None:
    old, new, big = meta(), meta(memory="44" * 32, created=2000.0), meta(memory_mib=512)
    for made in (old, new, big):
        put(tmp_path, made)
    (tmp_path / ".making-1234").mkdir()
    (tmp_path / "junk").mkdir()
    assert list_goldens(tmp_path)[0].id == new.id
    assert len(list_goldens(tmp_path)) == 3
    found = find_golden(tmp_path, "debian", 256)
    assert found is not None
    assert found.id == new.id
    assert find_golden(tmp_path, "debian", 256, 2) is None
    assert find_golden(tmp_path, "other", 256) is None
    assert find_golden(tmp_path, "debian", 256, accel="kvm") is None
    assert find_golden(tmp_path, "debian", 256, image_manifest="99" * 32) is None
    assert find_golden(tmp_path / "none", "debian", 256) is None


def test_damage_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(UnknownThing, match="haulier image warm"):
        Golden.load(tmp_path / ("0" * 64))
    path = put(tmp_path, meta())
    assert Golden.load(path).memory == path / "memory"
    renamed = path.rename(tmp_path / ("0" * 64))
    with pytest.raises(Corrupt, match="not what its id says"):
        Golden.load(renamed)
    path = renamed.rename(path)
    other = msgspec.structs.replace(meta(memory_mib=512), id=meta().id)
    (path / "meta.json").write_bytes(msgspec.json.encode(other))
    with pytest.raises(Corrupt, match="not what its id says"):
        Golden.load(path)
    (path / "meta.json").write_bytes(b"{")
    with pytest.raises(Corrupt, match="damaged"):
        Golden.load(path)
    (path / "meta.json").write_bytes(msgspec.json.encode(meta()))
    (path / "memory").unlink()
    with pytest.raises(Corrupt, match="has no memory"):
        Golden.load(path)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    with ChunkStore(tmp_path / "store") as store:
        yield store


def test_a_sound_snapshot_stays(tmp_path: Path, store: ChunkStore) -> None:
    golden = snapshot(tmp_path)
    assert golden_scrub.check(golden.path, store)
    assert golden_scrub.check(golden.path, store, rate=1 << 40)
    assert [found.id for found in list_goldens(tmp_path)] == [golden.id]
    assert golden_scrub.check(tmp_path / "none", store)


@pytest.mark.parametrize("where", [-1, 0], ids=["a page", "the header"])
def test_one_that_decayed_is_set_aside_and_nothing_starts_from_it(
    tmp_path: Path, store: ChunkStore, where: int, caplog: pytest.LogCaptureFixture
) -> None:
    golden = snapshot(tmp_path)
    store.save_manifest(golden.manifest_name, Manifest(CHUNK, store.put(b"x" * CHUNK)))
    decay(golden, where)
    assert not golden_scrub.check(golden.path, store)
    assert "warm the image again" in caplog.text
    assert list_goldens(tmp_path) == [] and not golden.path.exists()
    assert not store.is_pinned(golden.manifest_name), "its disk goes with the image"
    (aside,) = tmp_path.glob(".damaged-*")
    # Another time: it came again from elsewhere, and decayed again.
    golden = snapshot(tmp_path)
    decay(golden, where)
    assert not golden_scrub.check(golden.path, store)
    clear_unfinished(store, tmp_path / "run", tmp_path)
    assert not aside.exists()


def test_snapshots_are_looked_at_in_turn_those_of_long_ago_first(tmp_path: Path) -> None:
    golden, now = snapshot(tmp_path), time.time()
    never = put(tmp_path, meta())
    assert (found := golden_scrub.due(tmp_path, 60.0, {})) is not None and found.path == never
    assert golden_scrub.due(tmp_path, 60.0, {never.name: now}) is None
    os.utime(golden.path / "memory.digest", (now - 90.0, now - 90.0))
    found = golden_scrub.due(tmp_path, 60.0, {never.name: now})
    assert found is not None and found.id == golden.id
    assert golden_scrub.due(tmp_path, 60.0, {never.name: now, golden.id: now}) is None
    assert golden_scrub.due(tmp_path / "none", 60.0, {}) is None


def test_a_clone_fits_its_snapshot(tmp_path: Path) -> None:
    golden = Golden.load(put(tmp_path, meta()))
    spec = golden.spec("web1", address="10.77.0.10/24")
    assert (spec.golden, spec.image, spec.memory_mib, spec.disk_size) == (golden.id, "debian", 256, 4 << 30)
    assert golden.spec("web1").vmgenid != spec.vmgenid
    assert golden.manifest_name == f"golden/{golden.id}"


def test_blocks_are_counted_in_order_of_first_appearance() -> None:
    one, two, three = (bytes([n]) * 32 for n in (1, 2, 3))
    manifest = Manifest(6 * CHUNK, two + ZERO + one + two + three + one)
    assert block_fingerprints(manifest) == [two, one, three]
    assert block_fingerprints(Manifest(CHUNK, ZERO)) == []
