"""How a guest's things go away or come to life on a host: whole, and as often as one likes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.chunks.fingerprint import ZERO
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import UsageError
from haulier.handoff import residence
from haulier.handoff.ownership import State
from haulier.units import CHUNK
from tests.handoff.hosts import GUEST, HANDOFF, FakeQemu, Host, Hosts


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path, monkeypatch)
    yield hosts
    hosts.close()


@pytest.fixture
def oslo(hosts: Hosts) -> Host:
    hosts.oslo.record(State.OWNER, 3, role="source")
    return hosts.oslo


@pytest.fixture
def lisbon(hosts: Hosts) -> Host:
    hosts.lisbon.record(State.READY, 0, 4, role="target")
    return hosts.lisbon


def test_a_copy_is_thrown_away_with_all_that_belongs_to_it(lisbon: Host) -> None:
    lisbon.qemu = "paused"
    for _ in range(2):
        residence.discard_copy(lisbon.site, GUEST, HANDOFF)
        assert lisbon.qemu is None and lisbon.files() == []
        assert lisbon.manifests() == [] and lisbon.leases() == []
    assert lisbon.done == ["kill", "stop export"]
    with ChunkStore(lisbon.site.store) as store:
        # For the cache to keep or to give up: it serves the next attempt.
        assert store.manifest_names("attempt/") == [f"attempt/{GUEST}"] and not store.is_pinned(f"attempt/{GUEST}")


def test_a_copy_that_was_just_being_started_goes_too(lisbon: Host) -> None:
    lisbon.stray = True
    residence.discard_copy(lisbon.site, GUEST, HANDOFF)
    assert not lisbon.stray and lisbon.files() == []


def test_other_guests_and_handoffs_are_left_alone(lisbon: Host) -> None:
    other = lisbon.site.guest_root("web2")
    other.mkdir()
    with ChunkStore(lisbon.site.store) as store:
        disk = store.load_manifest(lisbon.incoming)
        for name in ("guest/web2", "guest/web10", "incoming/h10", "retained/web1", "image/debian"):
            store.save_manifest(name, disk)
        store.add_lease("handoff/h10")
    residence.discard_copy(lisbon.site, GUEST, HANDOFF)
    assert other.exists()
    assert lisbon.manifests() == ["guest/web10", "guest/web2", "image/debian", "incoming/h10", "retained/web1"]
    assert lisbon.leases() == ["handoff/h10"]


def test_an_original_is_retired_with_its_disk_as_it_was_handed_over(oslo: Host) -> None:
    final = Manifest(16 * CHUNK, ZERO * 16).replace({})
    with ChunkStore(oslo.site.store) as store:
        fp = store.put(b"\1" * CHUNK)
        store.commit()
        final = final.replace({3: fp})
        store.save_manifest(oslo.incoming, final)
    oslo.qemu = "postmigrate"
    for _ in range(2):
        residence.retire(oslo.site, GUEST, HANDOFF)
        assert oslo.qemu is None and oslo.files() == [] and oslo.leases() == []
        assert oslo.manifests() == [f"retained/{GUEST}"]
        with ChunkStore(oslo.site.store) as store:
            assert store.load_manifest(f"retained/{GUEST}") == final


def test_without_a_note_of_the_last_disk_the_one_before_is_kept(oslo: Host) -> None:
    with ChunkStore(oslo.site.store) as store:
        before = store.load_manifest(f"guest/{GUEST}")
    residence.retire(oslo.site, GUEST, HANDOFF)
    with ChunkStore(oslo.site.store) as store:
        assert store.load_manifest(f"retained/{GUEST}") == before
    residence.retire(oslo.site, GUEST, HANDOFF)
    assert oslo.manifests() == [f"retained/{GUEST}"]


@pytest.mark.parametrize(
    ("status", "alive"), [("paused", True), ("running", True), ("inmigrate", False), (None, False)]
)
def test_a_copy_is_alive_only_when_it_is_complete(lisbon: Host, status: str | None, alive: bool) -> None:
    lisbon.qemu = status
    assert residence.copy_alive(lisbon.site, GUEST) is alive


def test_resuming(oslo: Host) -> None:
    assert not residence.resume_original(oslo.site, GUEST)
    oslo.qemu = "postmigrate"
    assert residence.resume_original(oslo.site, GUEST) and oslo.qemu == "running"
    assert residence.resume_original(oslo.site, GUEST)
    assert oslo.done == ["resume"]


def test_a_copy_is_run_once_and_says_when(lisbon: Host) -> None:
    lisbon.qemu = "paused"
    assert residence.run_copy(lisbon.site, FakeQemu(lisbon)) == 12.5  # type: ignore[arg-type]
    assert residence.run_copy(lisbon.site, FakeQemu(lisbon)) > 1e9  # type: ignore[arg-type]
    assert lisbon.done == ["cont"]


def test_a_name_that_leads_elsewhere_is_refused(lisbon: Host) -> None:
    for name in ("../web1", "", "a/b", ".."):
        with pytest.raises(UsageError):
            residence.clear(lisbon.site, name)
