"""Handoffs as the agent sees them: what is refused at once, dead workers, messages about ownership."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
import pytest

from haulier.agent import handoffs as module
from haulier.agent.client import Client
from haulier.agent.server import Agent
from haulier.errors import Conflict, PeerError, UnknownThing, UsageError
from haulier.handoff import recovery, spawning
from haulier.handoff.journal import HandoffRow
from haulier.process import ProcessId
from tests.agent.conftest import Fleet
from tests.support.processes import process_of
from tests.support.waiting import wait_for


def own(agent: Agent, name: str = "web1", **changes: Any) -> None:
    agent.journal.advance(
        name, "absent", "owner", **{"owner": agent.site.name, "epoch": 1, "taken": 1, "wanted": "running", **changes}
    )


def test_unknown_guest_and_site(fleet: Fleet) -> None:
    own(fleet.at_oslo)
    with pytest.raises(UnknownThing, match="unknown site 'porto': known are lisbon, oslo"):
        fleet.client.start_handoff("web1", "porto")
    with pytest.raises(UnknownThing, match="no guest 'web9' at this site"):
        fleet.client.start_handoff("web9", "lisbon")
    with pytest.raises(UsageError, match="which is this site"):
        fleet.client.start_handoff("web1", "oslo")
    assert fleet.at_oslo.journal.handoffs() == []


@pytest.mark.parametrize(
    "options",
    [
        {"downtime_ms": 0},
        {"downtime_ms": 1 << 40},
        {"deadline_s": -1},
        {"level": 99},
        {"check": "yes"},
        {"stall_s": 0},
        {"allow": ["everything"]},
        {"allow": ["post-copy"], "check": True},
        {"through": ["oslo"]},
        {"through": ["lisbon"]},
        {"through": ["porto", "porto"]},
    ],
)
def test_options_out_of_bounds(fleet: Fleet, options: dict[str, Any]) -> None:
    own(fleet.at_oslo)
    with pytest.raises(UsageError):
        fleet.client.start_handoff("web1", "lisbon", options)


@pytest.mark.parametrize(
    ("state", "changes", "why"),
    [
        ("away", {"owner": "lisbon"}, "is at site 'lisbon' already"),
        ("offered", {"handoff": "h1"}, "being handed over already"),
        ("granted", {"handoff": "h1"}, "being handed over already"),
        ("serving", {"handoff": "h1"}, "being handed over already"),
        ("filling", {"handoff": "h1"}, "being handed over already"),
        ("owner", {"wanted": "stopped"}, "only a running guest"),
        ("owner", {"wanted": "creating"}, "only a running guest"),
    ],
)
def test_states_in_which_no_handoff_begins(fleet: Fleet, state: str, changes: dict[str, Any], why: str) -> None:
    own(fleet.at_oslo)
    fleet.at_oslo.journal.advance("web1", "owner", state, **changes)
    with pytest.raises(Conflict, match=why):
        fleet.client.start_handoff("web1", "lisbon")


def worker_process() -> subprocess.Popen[bytes]:
    """Stands for a worker: lives until its input is closed or it is told to end."""
    return subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)


@pytest.fixture
def begun(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    """A handoff at oslo with a worker that does nothing."""
    own(fleet.at_oslo)
    made: list[subprocess.Popen[bytes]] = []

    def start_source(site, journal, job):  # type: ignore[no-untyped-def]
        process = worker_process()
        made.append(process)
        journal.add_handoff(HandoffRow(job.handoff, job.guest, "source", job.peer))
        journal.set_worker(job.handoff, process_of(process))
        journal.advance("web1", "owner", "offered", pending=2, last_epoch=2, handoff=job.handoff)
        directory = site.handoff_root(job.handoff)
        directory.mkdir()
        (directory / "status.json").write_text(json.dumps({"phase": "memory", "progress": 0.5, "eta_s": 3.0}))
        return process

    monkeypatch.setattr(spawning, "start_source", start_source)
    yield fleet.client.start_handoff("web1", "lisbon", {"downtime_ms": 200})
    for process in made:
        process.kill()
        process.wait(10)
        assert process.stdin is not None
        process.stdin.close()


def test_a_handoff_is_shown_by_id_and_by_guest(fleet: Fleet, begun: dict[str, Any]) -> None:
    for name in (begun["id"], "web1"):
        facts = fleet.client.handoff(name)
        assert facts["id"] == begun["id"] and facts["state"] == "running" and facts["target"] == "lisbon"
        assert facts["status"]["phase"] == "memory"
    assert [h["id"] for h in fleet.client.handoffs()] == [begun["id"]]
    with pytest.raises(Conflict, match="being handed over already"):
        fleet.client.start_handoff("web1", "lisbon")
    with pytest.raises(UnknownThing, match="no handoff and no guest"):
        fleet.client.handoff("h-none")


def test_a_guest_goes_on_as_soon_as_the_handoff_by_which_it_came_has_ended(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it came from is told that it has come before everything is cleared away here."""
    journal = fleet.at_oslo.journal
    begun: list[str] = []
    monkeypatch.setattr(spawning, "start_source", lambda site, journal, job: begun.append(journal.handoff("h0").state))
    monkeypatch.setattr(module, "ARRIVED_S", 30.0)
    waited = threading.Event()
    sleep = time.sleep
    monkeypatch.setattr(module.time, "sleep", lambda s: (waited.set(), sleep(s)))
    own(fleet.at_oslo, handoff="h0")
    journal.add_handoff(HandoffRow("h0", "web1", "target", "lisbon"))
    ends = threading.Thread(target=lambda: (waited.wait(30), journal.end_handoff("h0", "done")))
    ends.start()
    with contextlib.suppress(UnknownThing):  # of a handoff that is not really begun
        fleet.client.start_handoff("web1", "lisbon")
    ends.join()
    assert begun == ["ended"]


def test_a_status_file_that_is_not_whole_is_no_error(fleet: Fleet, begun: dict[str, Any]) -> None:
    path = fleet.oslo.handoff_root(begun["id"]) / "status.json"
    for text in ('{"phase": "mem', "[]", "", "nul"):
        path.write_text(text)
        assert fleet.client.handoff(begun["id"])["status"] == {}


def test_cancel_reaches_the_worker_and_a_dead_worker_is_settled_as_cancelled(
    fleet: Fleet, begun: dict[str, Any]
) -> None:
    """The worker here dies of the signal at once, as a real one does before it has set up its handlers."""
    fleet.client.cancel("web1")
    wait_for(lambda: fleet.client.handoff(begun["id"])["state"] == "ended", 20)
    facts = fleet.client.handoff(begun["id"])
    assert facts["outcome"] == "cancelled" and facts["code"] == 11
    assert fleet.at_oslo.journal.guest("web1").state == "owner"
    with pytest.raises(Conflict, match="is over"):
        fleet.client.cancel(begun["id"])


def test_no_cancel_after_the_token(fleet: Fleet, begun: dict[str, Any]) -> None:
    fleet.at_oslo.journal.advance("web1", "offered", "granted")
    with pytest.raises(Conflict, match="has been given to site 'lisbon'"):
        fleet.client.cancel(begun["id"])


def test_a_guest_is_taken_back_only_from_a_site_that_is_out_of_the_fleet(fleet: Fleet, begun: dict[str, Any]) -> None:
    journal, pid = fleet.at_oslo.journal, fleet.at_oslo.journal.handoff(begun["id"]).pid
    with pytest.raises(Conflict, match="only one that is 'granted'"):
        fleet.client.post("/v1/guests/web1/reclaim")
    journal.advance("web1", "offered", "granted")
    with pytest.raises(Conflict, match="'lisbon' may run guest 'web1'"):
        fleet.client.post("/v1/guests/web1/reclaim")
    assert journal.guest("web1").state == "granted"
    with pytest.raises(Conflict, match="is under way"):
        fleet.client.wait(fleet.client.delete("/v1/sites/lisbon"))
    fleet.client.wait(fleet.client.delete("/v1/sites/lisbon?force=1"))
    facts = fleet.client.post("/v1/guests/web1/reclaim", timeout=60)
    assert facts["epoch"] == 3, "the granted epoch, 2, is burnt"
    assert "boot it with 'haulier guest start web1'" in facts["status"]
    assert journal.guest("web1").state == "owner"
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    over = fleet.client.handoff(begun["id"])
    assert (over["state"], over["outcome"]) == ("ended", "failed")
    with pytest.raises(UnknownThing):
        fleet.client.post("/v1/guests/web9/reclaim")


def test_a_worker_that_dies_is_noticed(fleet: Fleet, begun: dict[str, Any]) -> None:
    psutil.Process(fleet.at_oslo.journal.handoff(begun["id"]).pid).kill()
    wait_for(lambda: fleet.client.handoff(begun["id"])["state"] == "ended", 20)
    assert fleet.client.handoff(begun["id"])["outcome"] == "failed"
    assert fleet.at_oslo.journal.guest("web1").state == "owner"
    assert fleet.at_oslo.journal.guest("web1").last_epoch == 2


def test_recovery_is_tried_again_ever_more_slowly(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = fleet.at_oslo
    agent._stopping.set()  # this test does the watching
    for loop in agent._loops:
        loop.join(10)
    agent.handoffs.beside = lambda work: work()
    own(agent)
    agent.journal.add_handoff(HandoffRow("h1", "web1", "source", "lisbon", created=1.0))
    agent.journal.advance("web1", "owner", "granted", pending=2, handoff="h1")
    tried: list[float] = []
    clock = [100.0]

    def recover(*args: Any) -> bool:
        tried.append(clock[0])
        if len(tried) == 2:
            raise PeerError("not now")
        if len(tried) == 3:
            raise ZeroDivisionError
        return False

    monkeypatch.setattr(recovery, "recover", recover)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    while clock[0] < 160:
        agent.handoffs.supervise()
        clock[0] += 0.5
    assert tried == [100.0, 101.0, 103.0, 108.0, 118.0, 148.0]


def test_a_target_that_was_killed_between_two_writes(fleet: Fleet) -> None:
    """The guest is RECEIVING, its handoff was never recorded: at the start it is given up."""
    journal = fleet.at_lisbon.journal
    journal.advance("web1", "absent", "receiving", pending=2, last_epoch=2, handoff="h7", owner="oslo", spec={})
    fleet.at_lisbon.handoffs.adopt()
    wait_for(lambda: journal.handoff("h7").state == "ended" or time.time() - journal.handoff("h7").created > 15, 30)
    assert journal.guest("web1").state == "refused"
    assert journal.handoff("h7").outcome == "failed"


# -- ownership between agents ------------------------------------------------------------------------------------


def test_only_a_party_is_heard(fleet: Fleet) -> None:
    journal = fleet.at_lisbon.journal
    journal.advance("web1", "absent", "ready", pending=2, last_epoch=2, handoff="h1", owner="faro")
    journal.add_handoff(HandoffRow("h1", "web1", "target", "faro", epoch=2, pid=1, state="held"))
    assert fleet.to_lisbon().ownership("web1", "abort", 2) == {"messages": []}
    assert journal.guest("web1").state == "ready"


@pytest.mark.parametrize(
    ("state", "event"),
    [("granted", "refused"), ("granted", "took"), ("ready", "token"), ("ready", "abort"), ("filling", "gone")],
)
@pytest.mark.parametrize("live", [False, True])
def test_only_the_other_site_of_the_handoff_under_way_moves_anything(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, state: str, event: str, live: bool
) -> None:
    """oslo had to do with the guest once; this handoff is with faro."""
    journal = fleet.at_lisbon.journal
    epoch = 2 if state == "filling" else 3
    held = {"epoch": 2, "taken": 2} if state in ("granted", "filling") else {"pending": 3}
    journal.advance(
        "web1", "absent", state, **{"pending": 3 if state == "granted" else 0, **held}, last_epoch=3, handoff="h2"
    )
    journal.add_handoff(HandoffRow("h1", "web1", "target", "oslo", epoch=2, state="ended", outcome="done"))
    journal.add_handoff(HandoffRow("h2", "web1", "source", "faro", epoch=3, state="held"))
    told: list[int] = []
    monkeypatch.setattr(recovery, "worker_alive", lambda row: live)
    monkeypatch.setattr(ProcessId, "signal", lambda worker, number: told.append(number))
    monkeypatch.setattr(recovery, "copy_alive", lambda site, guest: True)
    before = journal.guest("web1")
    assert fleet.to_lisbon().ownership("web1", event, epoch) == {"messages": []}
    assert journal.guest("web1") == before and not told


def test_a_site_that_only_sent_a_prefetch_has_no_part_in_the_guest(fleet: Fleet) -> None:
    journal = fleet.at_lisbon.journal
    journal.advance("web1", "absent", "owner", epoch=2, taken=2, last_epoch=2)
    journal.add_handoff(HandoffRow("h1", "web1", spawning.PREFETCH_TARGET, "oslo", state="ended"))
    assert fleet.to_lisbon().ownership("web1", "token", 2) == {"messages": []}


@pytest.mark.parametrize(("state", "taken", "answer"), [("refused", 0, "refused"), ("away", 2, "took")])
def test_a_site_that_waits_for_an_answer_gets_it_after_the_guest_was_removed_here(
    fleet: Fleet, state: str, taken: int, answer: str
) -> None:
    journal = fleet.at_lisbon.journal
    journal.advance("web1", "absent", state, taken=taken, last_epoch=3, handoff="h1", spec={"uuid": "x"})
    journal.add_handoff(HandoffRow("h1", "web1", "target", "oslo", epoch=2, state="ended", outcome="failed"))
    fleet.at_lisbon.guests.remove("web1")
    assert Client.local(fleet.lisbon).guests() == [] and journal.guest("web1").spec == {}
    assert fleet.to_lisbon().ownership("web1", "token", 2) == {"messages": [[answer, 2]]}


def test_a_token_that_comes_twice_is_answered_twice(fleet: Fleet) -> None:
    journal = fleet.at_lisbon.journal
    journal.advance("web1", "absent", "owner", epoch=2, taken=2, last_epoch=2, handoff="h1")
    journal.add_handoff(HandoffRow("h1", "web1", "target", "oslo", epoch=2, state="ended", outcome="done"))
    for _ in range(2):
        assert fleet.to_lisbon().ownership("web1", "token", 2, "h1") == {"messages": [["took", 2]]}
    assert fleet.to_lisbon().ownership("web9", "token", 2) == {"messages": []}


@pytest.mark.parametrize(
    "body",
    [
        {"guest": "web1", "event": "grant", "epoch": 1},
        {"guest": "web1", "event": "offer", "epoch": 1},
        {"guest": "web1", "event": "x", "epoch": 1},
        {"guest": "web1", "event": "token", "epoch": 0},
        {"guest": "web1", "event": "token", "epoch": -3},
        {"guest": "web1", "event": "token", "epoch": 1 << 80},
        {"guest": "web1", "event": "token"},
    ],
)
def test_messages_that_make_no_sense(fleet: Fleet, body: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        fleet.to_lisbon().post("/v1/peer/ownership", body)


def filling(agent: Agent, **changes: Any) -> None:
    agent.journal.advance("web1", "absent", "filling", **{"epoch": 2, "taken": 2, "handoff": "h1", **changes})
    agent.journal.add_handoff(HandoffRow("h1", "web1", "target", "oslo", epoch=2))


WANTED = {"guest": "web1", "handoff": "h1", "epoch": 2, "secret": "ab" * 32}


def test_memory_that_nobody_waits_for_is_not_gone_on_with(fleet: Fleet) -> None:
    filling(fleet.at_lisbon)
    with pytest.raises(UnknownThing):
        fleet.to_lisbon().resume({**WANTED, "handoff": "h2"})
    for wrong in ({"epoch": 3}, {"guest": "web2"}):
        with pytest.raises(Conflict, match="no such memory"):
            fleet.to_lisbon().resume({**WANTED, **wrong})
    for secret in (5, "", "ab" * 31, "xy" * 32):
        with pytest.raises(UsageError):
            fleet.to_lisbon().resume({**WANTED, "secret": secret})
    fleet.at_lisbon.journal.advance("web1", "filling", "owner")
    with pytest.raises(Conflict, match="no such memory"):
        fleet.to_lisbon().resume(WANTED)


def test_a_worker_that_still_waits_for_memory_is_told_and_the_source_asks_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    filling(fleet.at_lisbon)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(ProcessId, "signal", lambda worker, number: told.append((worker.pid, number)) or True)
    fleet.at_lisbon.journal.update_handoff("h1", pid=4711)
    with pytest.raises(Conflict, match="ask again"):
        fleet.to_lisbon().resume(WANTED)
    assert told == [(4711, recovery.LEFT_ALONE)]
