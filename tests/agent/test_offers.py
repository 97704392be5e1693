"""The target's preflight: everything that stands against a handoff is said before anything is sent."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from haulier.agent import core, offers
from haulier.chunks.manifest import Manifest
from haulier.errors import Conflict, HaulierError, NoRoom, NotTrusted, Unsupported, UsageError
from haulier.guests.accel import Accelerator, QemuInfo
from haulier.guests.model import DEFAULT_CPU, DEFAULT_MACHINE, new_spec
from haulier.handoff import spawning
from haulier.handoff.journal import HandoffRow
from haulier.handoff.messages import Accept, Offer
from tests.agent.conftest import Fleet
from tests.support.processes import process_of
from tests.support.waiting import wait_for

CHUNK = 65536
INFO = QemuInfo((10, 0, 2), frozenset({DEFAULT_MACHINE}), {DEFAULT_CPU: ()}, "tcg")


@pytest.fixture(autouse=True)
def capable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that can give everything; tests take something away."""
    monkeypatch.setattr(offers, "qemu_info", lambda: INFO)
    monkeypatch.setattr(offers, "qemu_version", lambda: INFO.version)
    monkeypatch.setattr(offers, "probe", lambda: Accelerator("tcg", "test"))


def make_offer(**changes: Any) -> dict[str, Any]:
    spec = msgspec.to_builtins(new_spec("web1", "debian", memory_mib=64, disk_size=CHUNK * 4))
    spec |= changes.pop("spec", {})
    offer = Offer(
        handoff="h123", source="oslo", spec=spec, epoch=2, secret="ab" * 32, manifest="cd" * 32, accelerator="tcg"
    )
    return dict(msgspec.to_builtins(msgspec.structs.replace(offer, **changes)))


def refused(fleet: Fleet, kind: type[HaulierError], match: str, **changes: Any) -> None:
    """Both the offer and the look before it say so, and nothing is begun."""
    body = make_offer(**changes)
    with pytest.raises(kind, match=match) as caught:
        fleet.to_lisbon().offer(body)
    assert "site 'lisbon' cannot take guest 'web1'" in str(caught.value)
    assert any(code == kind.exit_code for code, _ in fleet.to_lisbon().look(body)["reasons"])
    assert fleet.at_lisbon.journal.handoffs() == []


def test_nothing_stands_against_a_good_offer(fleet: Fleet) -> None:
    found = fleet.to_lisbon().look(make_offer())
    assert found["reasons"] == []
    assert found["manifest"] is False and found["memory_base"] == "" and found["accelerator"] == "tcg"


def test_a_guest_of_that_name_lives_there(fleet: Fleet) -> None:
    fleet.at_lisbon.journal.advance("web1", "absent", "owner", epoch=1, taken=1, owner="lisbon")
    refused(fleet, Conflict, "lives there already, at epoch 1")


def test_a_handoff_of_that_guest_is_under_way_there(fleet: Fleet) -> None:
    spec = make_offer()["spec"]
    facts = {"epoch": 3, "pending": 4, "last_epoch": 4, "handoff": "h9", "spec": spec}
    fleet.at_lisbon.journal.advance("web1", "absent", "granted", **facts)
    refused(fleet, Conflict, "under way there", spec={"uuid": spec["uuid"]})


def test_while_a_copy_is_thrown_away_there_its_guest_is_not_taken_in(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "SETTLING_S", 0.05)
    monkeypatch.setattr(offers.spawning, "accept", lambda *_, **__: pytest.fail("it was begun"))
    with (
        fleet.at_lisbon.core.alone(core.ownership_of("web1"), "settling who owns it"),
        pytest.raises(Conflict, match="settling who owns it"),
    ):
        fleet.to_lisbon().offer(make_offer())
    # What is as good as done is waited for.
    monkeypatch.setattr(core, "SETTLING_S", 30.0)
    with (
        contextlib.ExitStack() as settling,
        ThreadPoolExecutor(1) as pool,
    ):
        settling.enter_context(fleet.at_lisbon.core.alone(core.ownership_of("web1"), "settling who owns it"))
        entered = pool.submit(taken_in, fleet)
        wait_for(lambda: fleet.at_lisbon.core.is_busy("web1"))
        assert not entered.done()
        settling.close()
        assert entered.result(30)


def taken_in(fleet: Fleet) -> bool:
    with fleet.at_lisbon.core.taken_in("web1", "being offered"):
        return fleet.at_lisbon.core.is_busy(core.ownership_of("web1"))


def test_another_guest_of_that_name_does_not_stand_for_the_answer_to_a_token(fleet: Fleet) -> None:
    """From the guest itself an offer above the granted epoch says that it was taken, and the original is retired."""
    spec = make_offer()["spec"] | {"uuid": "11111111-2222-3333-4444-555555555555"}
    facts = {"epoch": 3, "pending": 4, "last_epoch": 4, "handoff": "h9", "spec": spec}
    fleet.at_lisbon.journal.advance("web1", "absent", "granted", **facts)
    refused(fleet, Conflict, "another guest of that name is on its way from there", epoch=9)
    assert fleet.at_lisbon.journal.guest("web1").state == "granted"


def test_an_epoch_that_was_used(fleet: Fleet) -> None:
    fleet.at_lisbon.journal.advance("web1", "absent", "away", last_epoch=7, taken=5)
    refused(fleet, Conflict, "remembers a guest of that name at epoch 7.*guest remove web1 --force")
    fleet.at_lisbon.guests.remove("web1")
    refused(fleet, Conflict, "remembers a guest of that name at epoch 7")
    fleet.at_lisbon.guests.remove("web1", force=True)
    assert fleet.to_lisbon().look(make_offer())["reasons"] == []


def test_too_little_memory(fleet: Fleet) -> None:
    refused(fleet, NoRoom, "MiB", spec={"memory_mib": 1 << 20})


def test_too_little_disk(fleet: Fleet) -> None:
    refused(fleet, NoRoom, "MiB free and 0 MiB in the cache, up to", disk_bytes=1 << 49)


def test_a_machine_type_that_is_not_there(fleet: Fleet) -> None:
    refused(fleet, Unsupported, "no machine type pc-q35-9.9", spec={"machine": "pc-q35-9.9"})


def test_a_cpu_that_is_not_there(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(fleet, Unsupported, "no CPU model Skylake", spec={"cpu": "Skylake-Server-v9"})
    monkeypatch.setattr(offers, "qemu_info", lambda: replace(INFO, cpus={DEFAULT_CPU: ("avx",)}))
    refused(fleet, Unsupported, "lacks avx")


def test_another_accelerator(fleet: Fleet) -> None:
    refused(fleet, Unsupported, "runs under kvm", accelerator="kvm")


def test_an_old_qemu(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offers, "qemu_info", lambda: replace(INFO, version=(7, 2, 9)))
    refused(fleet, Unsupported, "7.2.9 is too old")

    def none() -> QemuInfo:
        raise Unsupported("no qemu-system-x86_64 on this host: install it")

    monkeypatch.setattr(offers, "qemu_info", none)
    refused(fleet, Unsupported, "on this host")


def test_no_bridge_for_its_network(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offers, "exists", lambda bridge: False)
    refused(fleet, Unsupported, "no bridge br0", spec={"address": "10.77.0.10/24", "gateway": "10.77.0.1"})


def test_all_reasons_are_said_at_once(fleet: Fleet) -> None:
    fleet.at_lisbon.journal.advance("web1", "absent", "owner", epoch=1)
    body = make_offer(spec={"machine": "pc-q35-9.9", "memory_mib": 1 << 20})
    with pytest.raises(Conflict, match=r"lives there already.*; .*pc-q35-9\.9.*; .*MiB"):
        fleet.to_lisbon().offer(body)


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 0},
        {"epoch": 1 << 63},
        {"epoch": -1},
        {"secret": "ab"},
        {"manifest": "xy" * 32},
        {"handoff": "../x"},
        {"handoff": ""},
        {"disk_bytes": -1},
        {"memory_bases": ("x",) * 65},
        {"spec": {"name": "../x"}},
        {"spec": {"memory_mib": -5}},
        {"spec": {"mac": "$(reboot)"}},
        {"spec": {"cpu": "host"}},
        {"spec": {"disk_size": 1 << 60}},
    ],
)
def test_offers_that_make_no_sense(fleet: Fleet, changes: dict[str, Any]) -> None:
    for call in (fleet.to_lisbon().offer, fleet.to_lisbon().look):
        with pytest.raises(UsageError):
            call(make_offer(**changes))
    assert fleet.at_lisbon.journal.guests() == []


@pytest.mark.parametrize("body", [{}, {"handoff": 3}, {"spec": {}}])
def test_bodies_that_are_no_offers(fleet: Fleet, body: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="makes no sense"):
        fleet.to_lisbon().offer(body)


def test_a_site_offers_in_its_own_name_only(fleet: Fleet) -> None:
    with pytest.raises(NotTrusted, match="in the name of site 'porto'"):
        fleet.to_lisbon().offer(make_offer(source="porto"))


def accepted(monkeypatch: pytest.MonkeyPatch) -> list[Offer]:
    taken: list[Offer] = []

    def accept(site, journal, offer, *, manifest, memory_base):  # type: ignore[no-untyped-def]
        taken.append(offer)
        journal.advance("web1", "absent", "receiving", handoff=offer.handoff, pending=offer.epoch, spec=offer.spec)
        # a process that lives for the test: the handoff's "worker"
        process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        journal.add_handoff(HandoffRow(offer.handoff, "web1", "target", offer.source, epoch=offer.epoch))
        journal.set_worker(offer.handoff, process_of(process))
        return Accept(port=7, bulk=site.bulk, manifest=manifest, golden=False, memory_base=memory_base), process

    monkeypatch.setattr(spawning, "accept", accept)
    return taken


def test_an_offer_that_is_repeated_is_answered_as_before(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = accepted(monkeypatch)
    answer = fleet.to_lisbon().offer(make_offer())
    assert answer["port"] == 7 and answer["qemu"] == "10.0.2"
    assert fleet.to_lisbon().offer(make_offer()) == answer
    assert len(taken) == 1
    with pytest.raises(Conflict, match="is known"):
        fleet.to_lisbon().offer(make_offer(epoch=3))
    (process,) = fleet.at_lisbon.core.children
    assert process.stdin is not None
    process.stdin.close()
    process.wait(10)


def test_what_is_there_already_is_found(fleet: Fleet) -> None:
    store = fleet.at_lisbon.store
    here = [store.put(os.urandom(CHUNK)) for _ in range(3)]
    manifest = Manifest(CHUNK * 3, b"".join(here))
    store.save_manifest("image/debian", manifest)
    found = fleet.to_lisbon().look(make_offer(manifest=manifest.digest.hex(), disk_bytes=3 * CHUNK))
    assert found["manifest"] is True and found["missing_bytes"] == 0
    foreign = [os.urandom(32) for _ in range(2)]
    assert fleet.to_lisbon().lacking([here[0], foreign[0], here[1], foreign[1]]) == [1, 3]
    with pytest.raises(UsageError, match="32 bytes"):
        fleet.to_lisbon().post("/v1/peer/lacking", {"fingerprints": "AAAA"})
    with pytest.raises(UsageError, match="base64"):
        fleet.to_lisbon().post("/v1/peer/lacking", {"fingerprints": "%%"})


def test_the_link_is_measured(fleet: Fleet) -> None:
    rate, rtt = fleet.to_lisbon().measure()
    assert rate > 1e6 and 0 < rtt < 1


ROOM = CHUNK + 64


def cached(fleet: Fleet, chunks: int) -> list[bytes]:
    """Chunks at lisbon that nothing refers to."""
    store = fleet.at_lisbon.store
    fps = [store.put(os.urandom(CHUNK)) for _ in range(chunks)]
    store.save_manifest("past", Manifest(chunks * CHUNK, b"".join(fps)))
    store.drop_manifest("past")
    return fps


def free(monkeypatch: pytest.MonkeyPatch, amount: int) -> None:
    real = offers.shutil.disk_usage
    monkeypatch.setattr(offers.shutil, "disk_usage", lambda path: real(path)._replace(free=amount))


def test_a_store_that_is_in_use_up_to_its_budget(fleet: Fleet) -> None:
    store = fleet.at_lisbon.store
    fps = [store.put(os.urandom(CHUNK)) for _ in range(8)]
    store.save_manifest("guest/other", Manifest(8 * CHUNK, b"".join(fps)))
    fleet.at_lisbon.cache.budget = 10 * ROOM
    refused(fleet, NoRoom, "store's budget of 0 MiB leaves 0 MiB beside what is in use", disk_bytes=3 * CHUNK)
    assert fleet.to_lisbon().look(make_offer(disk_bytes=2 * CHUNK))["reasons"] == []


def test_the_cache_counts_as_free(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(fleet, 8)
    fleet.at_lisbon.cache.budget = 10 * ROOM
    assert fleet.to_lisbon().look(make_offer(disk_bytes=9 * CHUNK))["reasons"] == []
    need = (64 << 20) + offers._SLACK
    free(monkeypatch, need - 4 * CHUNK)
    assert fleet.to_lisbon().look(make_offer(disk_bytes=3 * CHUNK))["reasons"] == []
    refused(fleet, NoRoom, "MiB free and 0 MiB in the cache", disk_bytes=5 * CHUNK)


def test_an_offer_that_is_taken_makes_the_cache_give_way(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not what the guest itself will need."""
    fps = cached(fleet, 8)
    store = fleet.at_lisbon.store
    mine = Manifest(2 * CHUNK, fps[0] + fps[1])
    store.save_manifest("retained/web1", mine, pinned=False)
    with store.index.write() as db:
        db.executemany("UPDATE chunks SET used=1 WHERE fp=?", ((fp,) for fp in fps[:2]))
    fleet.at_lisbon.cache.policy = "lru"
    free(monkeypatch, (64 << 20) + offers._SLACK - 3 * CHUNK)
    monkeypatch.setattr(offers.spawning, "accept", lambda *args, **kwargs: (_ for _ in ()).throw(Conflict("enough")))
    with pytest.raises(Conflict, match="enough"):
        fleet.to_lisbon().offer(make_offer(manifest=mine.digest.hex()))
    assert len(store.missing(fps)) == 3 and store.missing(fps[:2]) == []
