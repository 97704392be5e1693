"""How workers begin: nothing is done by one that the journal does not know."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from haulier.agent.site import Site
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.guests.golden import MANIFEST_PREFIX
from haulier.handoff import spawning
from haulier.handoff.journal import HandoffRow, Journal
from haulier.handoff.messages import Job, Offer
from haulier.handoff.residence import discard_copy
from haulier.handoff.spawning import KEPT, Standby
from haulier.units import CHUNK
from tests.handoff.hosts import OFFER, SPEC
from tests.support.agents import make_site
from tests.support.processes import process_of
from tests.support.waiting import gone, wait_for

JOB = Job(handoff="h1", role="source", guest="web1", peer="lisbon")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path / "o", "oslo")


@pytest.fixture
def journal(site: Site) -> Iterator[Journal]:
    with Journal(site.journal) as journal:
        journal.add_handoff(HandoffRow(JOB.handoff, JOB.guest, JOB.role, JOB.peer))
        yield journal


@pytest.fixture
def standby(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standby]:
    """Workers that wait already."""
    found = Standby()
    monkeypatch.setattr(spawning, "STANDBY", found)
    found.warm()
    yield found
    found.close()


def never_told(process: subprocess.Popen[bytes], site: Site, handoff: str) -> bool:
    """As when the agent dies just before."""
    assert process.stdin is not None
    process.stdin.close()
    return True


def test_a_worker_stands_in_the_journal_before_it_learns_its_handoff(
    site: Site, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[int] = []

    def tell(process: subprocess.Popen[bytes], site: Site, handoff: str) -> bool:
        known.append(journal.handoff(handoff).pid)
        return never_told(process, site, handoff)

    monkeypatch.setattr(spawning, "_tell", tell)
    process = spawning.spawn(site, journal, JOB)
    assert known == [process.pid]
    assert process.wait(30) == 0
    assert not (site.handoff_root(JOB.handoff) / "worker.log").exists()


@pytest.mark.parametrize(
    ("state", "clearing"), [("away", "retire"), ("refused", "discard_copy"), ("absent", "discard_copy")]
)
def test_a_guest_that_comes_is_not_cleared_away_by_the_worker_of_its_last_handoff(
    site: Site, journal: Journal, monkeypatch: pytest.MonkeyPatch, state: str, clearing: str
) -> None:
    """That one keeps its picture still, or has not thrown its copy away yet, and clears away after that."""
    cleared: list[tuple[str, str]] = []
    monkeypatch.setattr(spawning, "LEAVE_S", 0.05)
    for how in ("retire", "discard_copy"):
        monkeypatch.setattr(spawning, how, lambda site, guest, handoff, how=how: cleared.append((how, handoff)))
    monkeypatch.setattr(spawning, "_start_target", lambda *_, **__: ("accepted", None))
    with subprocess.Popen(["sleep", "600"]) as late:
        journal.set_worker("h1", process_of(late))
        journal.advance("web1", "absent", state, last_epoch=4, taken=3, handoff="h1")
        offer = msgspec.structs.replace(OFFER, handoff="h2", source="lisbon", epoch=5)
        assert spawning.accept(site, journal, offer, manifest=False, memory_base="")[0] == "accepted"
        assert gone(late.pid)
    assert cleared == [(clearing, "h1")] and journal.guest("web1").state == "receiving"
    ended = "done" if state == "away" else "failed"
    assert (journal.handoff("h1").state, journal.handoff("h1").outcome) == ("ended", ended)
    # With nobody left there is nothing to be done about it.
    journal.advance("web1", "receiving", state)
    assert spawning.accept(
        site, journal, msgspec.structs.replace(offer, handoff="h3", epoch=6), manifest=False, memory_base=""
    )
    assert len(cleared) == 1


def test_workers_in_waiting_that_have_died_are_passed_over(site: Site, journal: Journal, standby: Standby) -> None:
    dead = standby.pids()
    assert len(dead) == KEPT
    for pid in dead:
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: gone(pid), 10, "its end")
    process = spawning.spawn(site, journal, JOB)
    assert process.pid not in dead and journal.handoff(JOB.handoff).pid == process.pid
    # It was told: it finds no such guest, and says so where a handoff's worker says all.
    assert process.wait(30) != 0
    assert "web1" in (site.handoff_root(JOB.handoff) / "worker.log").read_text()


def test_a_snapshot_of_which_the_cache_gave_up_chunks_is_not_there_and_one_that_is_there_stays(
    site: Site, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source may refer to all of it at once: what is gone, or goes meanwhile, would break the memory's stream."""
    monkeypatch.setattr(spawning, "spawn", lambda *_: None)
    monkeypatch.setattr(spawning, "_await_port", lambda *_: 7)
    golden, dice = "ab" * 32, random.Random(3)
    spec = msgspec.to_builtins(msgspec.structs.replace(SPEC, golden=golden))
    offer = Offer(handoff="h2", source="lisbon", spec=spec, epoch=5, secret="ab" * 32, manifest="cd" * 32, golden=True)

    def taken() -> bool:
        return spawning._start_target(site, journal, offer, "target", manifest=False, memory_base="")[0].golden

    assert not taken()
    with ChunkStore(site.store) as store:
        disk = b"".join(store.put(dice.randbytes(CHUNK)) for _ in range(3))
        name = MANIFEST_PREFIX + golden
        store.save_manifest(name, Manifest(len(disk) // 32 * CHUNK, disk))
        assert taken() and store.leases() == []
        store.pin_manifest(name, False)
        assert taken()
        store.gc()
        assert not store.missing([disk[:32], disk[32:64], disk[64:]]), "the handoff needs them"
        discard_copy(site, SPEC.name, offer.handoff)
        store.gc()
        assert not taken()
