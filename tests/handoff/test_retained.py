"""Pictures of memory left behind: kept, found, offered, replaced, forgotten."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from haulier.agent.site import Site
from haulier.chunks.store import ChunkStore
from haulier.errors import Corrupt
from haulier.handoff import attempts, retained
from haulier.handoff.retained import GOLDEN, Retained
from haulier.memory.mirror import Mirror
from haulier.units import PAGE
from tests.support.goldens import decay, snapshot

UUID = "8b7c5ad4-6d9e-4c43-9a1a-0f3c5d2b1a00"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "site", "oslo", "127.0.0.1:7440")
    site.make_directories()
    return site


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were made durable, in that order."""
    names: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return names


def leave(site: Site, epoch: int, fill: int, uuid: str = UUID) -> Retained:
    """What a handoff leaves behind."""
    path = site.mirror(f"h{epoch}")
    mirror = Mirror.create(path, {"ram0": 4 * PAGE}, None)
    mirror.set(np.array([2]), np.full((1, PAGE), fill, np.uint8))
    mirror.complete()
    mirror.close()
    meta = Retained(id=retained.memory_id(uuid, epoch, bytes([fill]) * 32), guest="web1", uuid=uuid, epoch=epoch)
    retained.keep(site, meta, path)
    assert not path.exists(), "moved, not copied"
    return meta


def test_what_is_kept_is_found_and_is_the_memory(site: Site) -> None:
    meta = leave(site, 2, 7)
    assert retained.find(site, "web1", UUID) == meta
    base = retained.open_base(site, "web1", UUID, meta.id)
    assert base is not None
    assert base.blocks == {"ram0": 4 * PAGE}
    assert base.view("ram0")[2].tolist() == [7] * PAGE
    assert not base.view("ram0")[1].any()


def named(synced: list[str]) -> list[str]:
    return [name for name in synced if name == "memory" or name.startswith(".meta.json.")]


@pytest.mark.parametrize("closed", [False, True])
def test_the_pages_are_durable_before_the_note_that_makes_them_a_picture(
    site: Site, synced: list[str], closed: bool
) -> None:
    """After a power cut there is no picture, or a whole one."""
    if closed:
        leave(site, 2, 7)
    else:
        mirror = Mirror.create(site.mirror("h2"), {"ram0": 4 * PAGE}, None)
        mirror.set(np.array([2]), np.full((1, PAGE), 7, np.uint8))
        retained.keep(site, Retained(id="x", guest="web1", uuid=UUID, epoch=2), mirror)
        mirror.close()
    assert [name.split(".")[0] or "meta" for name in named(synced)] == ["memory", "meta"]


def test_so_are_those_of_an_attempt(site: Site, synced: list[str]) -> None:
    mirror = Mirror.create(site.mirror("h2"), {"ram0": 4 * PAGE}, None)
    mirror.set(np.array([2]), np.full((1, PAGE), 7, np.uint8))
    mirror.close()
    meta = attempts.Attempt(handoff="h2", guest="web1", uuid=UUID, peer="lisbon")
    assert attempts.keep(site, meta, site.mirror("h2"), None)
    assert [name.split(".")[0] or "meta" for name in named(synced)] == ["memory", "meta"]


def test_the_later_picture_replaces_the_earlier(site: Site) -> None:
    old, new = leave(site, 2, 7), leave(site, 3, 9)
    assert retained.find(site, "web1", UUID) == new
    base = retained.open_base(site, "web1", UUID, new.id)
    assert base is not None and base.view("ram0")[2][0] == 9
    with pytest.raises(Corrupt, match="is not at site 'oslo'"):
        retained.open_base(site, "web1", UUID, old.id)


def test_a_guest_of_the_same_name_is_another_guest(site: Site) -> None:
    meta = leave(site, 2, 7)
    other = UUID.replace("8b", "8c")
    assert retained.find(site, "web1", other) is None
    assert retained.candidates(site, "web1", other, "") == []
    with pytest.raises(Corrupt):
        retained.open_base(site, "web1", other, meta.id)


def test_the_last_stay_is_better_than_the_golden_snapshot(site: Site) -> None:
    golden = "ab" * 32
    assert retained.candidates(site, "web1", UUID, golden) == []
    (site.golden / golden).mkdir()
    (site.golden / golden / "memory").touch()
    assert retained.candidates(site, "web1", UUID, golden) == [GOLDEN + golden]
    meta = leave(site, 2, 7)
    assert retained.candidates(site, "web1", UUID, golden) == [meta.id, GOLDEN + golden]
    assert retained.open_base(site, "web1", UUID, "") is None


@pytest.mark.parametrize("name", ["../retained/web1", "..", "", "cd" * 32])
def test_a_golden_snapshot_is_named_by_its_id_alone(site: Site, name: str) -> None:
    leave(site, 2, 7)
    with pytest.raises(Corrupt, match="is not at 'oslo'"):
        retained.open_base(site, "web1", UUID, GOLDEN + name)


def test_a_peer_names_no_picture_that_was_not_offered() -> None:
    mine, anothers = GOLDEN + "ab" * 32, GOLDEN + "cd" * 32
    retained.check_named(mine, (mine, "x"), "lisbon")
    retained.check_named("", (mine,), "lisbon")
    for known in ((mine,), ()):
        with pytest.raises(Corrupt, match="'lisbon' wants to begin"):
            retained.check_named(anothers, known, "lisbon")


@pytest.mark.parametrize("damage", ["no meta", "no memory", "nonsense"])
def test_a_damaged_picture_is_no_picture(site: Site, damage: str) -> None:
    leave(site, 2, 7)
    directory = site.retained / "web1"
    if damage == "no meta":
        (directory / "meta.json").unlink()
    elif damage == "no memory":
        (directory / "memory").unlink()
    else:
        (directory / "meta.json").write_text('{"id": 5')
    assert retained.find(site, "web1", UUID) is None


def test_forgetting_twice_is_no_error(site: Site) -> None:
    leave(site, 2, 7)
    retained.forget(site, "web1")
    retained.forget(site, "web1")
    assert not list(site.retained.iterdir())


def test_ids_tell_guests_epochs_and_streams_apart() -> None:
    ids = {
        retained.memory_id(uuid, epoch, digest)
        for uuid in (UUID, UUID[::-1])
        for epoch in (1, 2)
        for digest in (b"a" * 32, b"b" * 32)
    }
    assert len(ids) == 8


def test_after_a_mismatch_the_golden_snapshot_is_looked_at_and_no_other_picture(site: Site) -> None:
    golden = snapshot(site.golden)
    name = GOLDEN + golden.id
    with ChunkStore(site.store) as store:
        retained.suspect(site, store, name)
        assert retained.candidates(site, "web1", UUID, golden.id) == [name]
        decay(golden)
        for other in ("", "attempt:h1", "x", GOLDEN + "cd" * 32):
            retained.suspect(site, store, other)
        assert retained.candidates(site, "web1", UUID, golden.id) == [name]
        retained.suspect(site, store, name)
    assert retained.candidates(site, "web1", UUID, golden.id) == []
    with pytest.raises(Corrupt, match="try again"):
        retained.open_base(site, "web1", UUID, name)
