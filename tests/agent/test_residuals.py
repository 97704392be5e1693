"""Data left behind, as the two agents of a guest's old and new site see it; no guest runs here."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from haulier.agent import residuals as residuals_module
from haulier.agent.residuals import ResidualMessage
from haulier.agent.server import Agent
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.disks.export import DiskExport
from haulier.disks.nbd import NbdReader
from haulier.errors import Conflict, GuestError, NotTrusted, PeerError, UnknownThing
from haulier.handoff.journal import HandoffRow, SiteRow
from haulier.handoff.residence import guest_paths, manifest_name, pin_name
from haulier.units import CHUNK
from tests.support import agents
from tests.support.agents import make_site, running
from tests.support.relay import reset
from tests.support.waiting import wait_for

COUNT = 40
HERE = 8


@dataclass
class Two:
    old: Agent
    new: Agent
    manifest: Manifest
    contents: list[bytes]

    def left(self) -> int:
        return self.new.residuals.missing(self.new.journal.guest("web1"))

    def pinned(self) -> bool:
        return pin_name("web1", "h1") in self.old.store.manifest_names("residual/")


@pytest.fixture
def two(short: Path) -> Iterator[Two]:
    """web1 went from old to new and left all but its first chunks behind."""
    first = make_site(short / "old", "old")
    with running(first) as old:
        second = agents.join(first, short / "new", "new")
        with running(second) as new:
            contents = [bytes([n + 1]) * 16 + os.urandom(CHUNK - 16) for n in range(COUNT)]
            with ChunkStore(first.store) as store:
                fps = [store.put(data) for data in contents]
                manifest = Manifest(COUNT * CHUNK, b"".join(fps))
                store.save_manifest(pin_name("web1", "h1"), manifest, {"target": "new", "since": 1.0})
            with ChunkStore(second.store) as store:
                for data in contents[:HERE]:
                    store.put(data)
                store.save_manifest(manifest_name("web1"), manifest, {"residual": {}}, partial=True)
            new.journal.advance("web1", "absent", "owner", owner="new", epoch=2, manifest=manifest_name("web1"))
            new.journal.add_handoff(HandoffRow("h1", "web1", "target", "old", detail={"residual": "held"}))
            new.journal.end_handoff("h1", "done")
            yield Two(old, new, manifest, contents)


def test_nothing_is_let_go_of_while_something_is_missing(two: Two) -> None:
    assert two.left() == (COUNT - HERE) * CHUNK
    two.new.residuals.tell()
    (left,), (here,) = two.old.residuals.left(), two.new.residuals.here()
    assert left["left_bytes"] == here["left_bytes"] == (COUNT - HERE) * CHUNK
    with pytest.raises(Conflict, match="still lacks"):
        two.old.residuals.release("web1", force=False)
    with pytest.raises(Conflict, match="only known to be at site 'old'"):
        two.new.residuals.release("web1", force=False)
    with pytest.raises(Conflict, match="still at site 'old'"):
        two.new.residuals.check_may_leave("web1", "third")
    two.new.residuals.check_may_leave("web1", "old")
    two.old.store.gc()
    assert two.old.store.missing(two.manifest.unique()) == []
    assert two.pinned()
    with pytest.raises(UnknownThing):
        two.old.residuals.release("web2", force=False)


def test_filling_brings_all_and_the_pins_go(two: Two) -> None:
    job = two.new.residuals.fill("web1", "full")
    wait_for(lambda: two.new.core.jobs.get(job.id).state != "running", 30)
    done = two.new.core.jobs.get(job.id)
    assert done.state == "done", done.error
    assert two.left() == 0
    assert not two.pinned()
    assert two.new.store.is_complete(manifest_name("web1"))
    assert two.new.journal.handoff("h1").detail["residual"] == "released"
    assert two.new.residuals.here() == two.old.residuals.left() == []
    two.new.residuals.check_may_leave("web1", "third")
    two.old.store.gc(), two.new.store.gc()
    with ChunkStore(two.new.site.store) as store:
        assert all(store.get(two.manifest[n]) == data for n, data in enumerate(two.contents))


def test_an_export_fetches_what_is_read_first_and_then_the_rest(two: Two) -> None:
    paths = guest_paths(two.new.site, "web1")
    paths.prepare()
    name = manifest_name("web1")
    export = DiskExport.start(two.new.site.store, name, paths.nbd_sock, paths.nbd_ctl, paths.nbd_log, mode="off")
    try:
        with NbdReader(paths.nbd_sock, "disk0", []) as reader:
            assert bytes(reader.read(30 * CHUNK + 100, 5000)) == two.contents[30][100:5100]
            assert bytes(reader.read(2 * CHUNK, CHUNK)) == two.contents[2]
            fill = export.stats()["fill"]
            assert (fill["demanded"], fill["missing"]) == (1, COUNT - HERE - 1)
            export.fill("background")
            wait_for(lambda: export.stats()["fill"]["missing"] == 0, 30)
            assert b"".join(bytes(d) for _, d in reader.read_many(range(0, COUNT * CHUNK, CHUNK), CHUNK)) == b"".join(
                two.contents
            )
        counts = export.heat()
        assert counts is not None and counts[30] == 2
        wait_for(lambda: two.left() == 0, 30)
        two.new.residuals.tell()
        assert not two.pinned()
    finally:
        export.stop()


def test_an_export_goes_on_once_there_is_room_again(two: Two) -> None:
    """Its files may not grow for a while: what comes cannot be kept."""
    paths = guest_paths(two.new.site, "web1")
    paths.prepare()
    name, where = manifest_name("web1"), (paths.nbd_sock, paths.nbd_ctl, paths.nbd_log)
    export = DiskExport.start(two.new.site.store, name, *where, patience_s=0.5, mode="off")
    try:
        usual = resource.prlimit(export.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(export.pid, resource.RLIMIT_FSIZE, (4096, usual[1]))
        with NbdReader(paths.nbd_sock, "disk0", []) as reader, pytest.raises(GuestError, match="error 5"):
            reader.read(30 * CHUNK, CHUNK)
        job = two.new.residuals.fill("web1", "full")
        wait_for(lambda: "no room left" in two.new.core.jobs.get(job.id).message, 30)
        assert export.stats()["fill"]["unserved"] == 1
        resource.prlimit(export.pid, resource.RLIMIT_FSIZE, usual)
        # The agent lets the guest go on only then.
        wait_for(lambda: export.stats()["fill"]["unserved"] == 0, 30)
        wait_for(lambda: two.new.core.jobs.get(job.id).state != "running", 30)
        assert two.new.core.jobs.get(job.id).state == "done" and two.left() == 0
        assert not two.pinned()
    finally:
        export.stop()


def test_a_bad_chunk_is_healed_by_another_site(two: Two) -> None:
    paths = guest_paths(two.new.site, "web1")
    paths.prepare()
    (pack,) = list((two.new.site.store / "packs").glob("*.pack"))
    raw = bytearray(pack.read_bytes())
    at = raw.index(two.contents[3][:64])
    raw[at + 20] ^= 1
    pack.write_bytes(raw)
    name = manifest_name("web1")
    export = DiskExport.start(two.new.site.store, name, paths.nbd_sock, paths.nbd_ctl, paths.nbd_log, mode="off")
    try:
        with NbdReader(paths.nbd_sock, "disk0", []) as reader:
            assert bytes(reader.read(3 * CHUNK, CHUNK)) == two.contents[3]
    finally:
        export.stop()


def test_only_the_new_site_may_speak_of_it(two: Two) -> None:
    message = ResidualMessage(guest="web1", handoff="h1", left=0)
    with pytest.raises(NotTrusted):
        two.old.residuals.told(message, "third")
    assert two.pinned()
    with pytest.raises(NotTrusted):
        two.new.residuals.asked(message, "third")
    # Said before this site knows that its own handoff is over: not yet.
    two.old.journal.add_handoff(HandoffRow("h1", "web1", "source", "new"))
    assert two.old.residuals.told(message, "new") == {"kept": True}
    two.old.journal.end_handoff("h1", "done")
    assert two.old.residuals.told(message, "new") == {"kept": False}
    assert two.old.residuals.told(message, "new") == {"kept": False}


@pytest.mark.parametrize("state", ["granted", "serving", "receiving", "ready", "poised"])
def test_nothing_is_let_go_of_on_the_word_of_a_site_that_the_guest_is_leaving(two: Two, state: str) -> None:
    """It may own the guest again: the token is refused where its copy is lost."""
    two.new.journal.advance("web1", "owner", state)
    with pytest.raises(Conflict, match="under way"):
        two.old.residuals.release("web1", force=False)
    two.new.journal.advance("web1", state, "owner", manifest="")
    with pytest.raises(Conflict, match="under way"):
        two.old.residuals.release("web1", force=False)
    assert two.pinned()
    two.new.journal.advance("web1", "owner", "away")
    assert two.old.residuals.release("web1", force=False)["released"] == ["h1"]


def test_a_manifest_that_is_lost_lets_nothing_go(two: Two) -> None:
    two.new.store.drop_manifest(manifest_name("web1"))
    two.new.residuals.tell()
    assert two.pinned()
    with pytest.raises(Conflict, match="does not say"):
        two.old.residuals.release("web1", force=False)
    with pytest.raises(UnknownThing):
        two.new.residuals.release("web1", force=False)
    assert two.pinned()


def test_what_a_guest_left_behind_is_kept_when_it_came_without_its_memory(two: Two) -> None:
    """A post-copy that was cut for good has failed, but the guest is here, and its disk is only whole with the rest."""
    journal = two.new.journal
    journal.advance("web1", "owner", "owner", taken=2)
    journal.update_handoff("h1", outcome="failed", epoch=2)
    two.new.residuals.tell()
    assert two.pinned() and [row.id for row in two.new.residuals.held()] == ["h1"]
    (left,) = two.old.residuals.left()
    assert left["left_bytes"] == (COUNT - HERE) * CHUNK
    job = two.new.residuals.fill("web1", "full")
    wait_for(lambda: two.new.core.jobs.get(job.id).state != "running", 30)
    assert two.left() == 0 and not two.pinned()


def test_what_is_still_kept_is_not_noted_as_released(two: Two) -> None:
    """The source has not noted the end of its side yet."""
    for data in two.contents:
        two.new.store.put(data)
    two.old.journal.add_handoff(HandoffRow("h1", "web1", "source", "new"))
    two.new.residuals.tell()
    assert two.pinned() and two.new.journal.handoff("h1").detail["residual"] == "held"
    two.old.journal.end_handoff("h1", "done")
    two.new.residuals._said.clear()
    two.new.residuals.tell()
    assert not two.pinned() and two.new.journal.handoff("h1").detail["residual"] == "released"


def test_by_force_where_the_new_site_is_gone_for_good(two: Two) -> None:
    assert two.old.residuals.release("web1", force=True)["released"] == ["h1"]
    assert not two.pinned()


def test_what_belongs_to_a_handoff_that_failed_is_given_up(two: Two) -> None:
    two.new.journal.add_handoff(HandoffRow("h0", "web1", "target", "old", detail={"residual": "held"}))
    two.new.journal.end_handoff("h0", "failed")
    two.new.residuals.tell()
    assert two.new.journal.handoff("h0").detail["residual"] == "released"
    assert [row.id for row in two.new.residuals.held()] == ["h1"]
    assert two.pinned()


def end_loops(agent: Agent) -> None:
    """What the agent does by itself every few seconds."""
    agent._stopping.set()
    for loop in agent._loops:
        loop.join(10)


@contextlib.contextmanager
def nobody_answers(*, closes: bool) -> Iterator[tuple[str, list[socket.socket]]]:
    """(Address where connections come to nothing, those that were made); with `closes` they are reset at once."""
    made: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    made.append(server.accept()[0])
                    if closes:
                        reset(made[-1])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}", made
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            for each in made:
                each.close()


def test_a_site_that_is_down_is_not_told_all_the_time(
    two: Two, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residuals_module, "TELL_AGAIN_S", (600.0, 600.0))
    end_loops(two.new)
    for data in two.contents:
        two.new.store.put(data)
    journal, residuals = two.new.journal, two.new.residuals
    journal.add_handoff(HandoffRow("h0", "web2", "target", "old", "ended", detail={"residual": "held"}))
    where = journal.site("old")
    with nobody_answers(closes=True) as (dead, made), caplog.at_level(logging.INFO, "haulier.agent.residuals"):
        journal.put_sites([SiteRow("old", dead)])
        for _ in range(20):
            residuals.tell()
        assert len(made) == 1, "one try for all that it keeps"
        residuals._failing = {key: (why, 0.0, wait) for key, (why, _, wait) in residuals._failing.items()}
        residuals.tell()
        assert len(made) == 2
        assert sum("cannot be told" in record.message for record in caplog.records) == 1
        with pytest.raises(PeerError, match="cannot be told now"):
            residuals.release("web1", force=False)
        assert len(made) == 3, "the operator's word is tried at once"
    journal.put_sites([where])
    residuals.tell()
    assert two.pinned()
    residuals.release("web1", force=False)
    assert not two.pinned()
    residuals.tell()
    assert journal.handoff("h0").detail["residual"] == "released", "it answers again, for the others as well"


def test_what_one_site_keeps_need_not_wait_for_another_that_is_silent(two: Two) -> None:
    end_loops(two.new)
    for data in two.contents:
        two.new.store.put(data)
    journal = two.new.journal
    journal.add_handoff(HandoffRow("h2", "web2", "target", "dark", "ended", created=2e10, detail={"residual": "held"}))
    with nobody_answers(closes=False) as (dark, made):
        journal.put_sites([SiteRow("dark", dark)])
        telling = threading.Thread(target=two.new.residuals.tell)
        telling.start()
        wait_for(lambda: len(made) == 1, 10)
        two.new.residuals.release("web1", force=False)
        assert telling.is_alive() and not two.pinned()
        made[0].close()
        telling.join(30)
