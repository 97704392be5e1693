"""The source's word on who owns the guest, with two real journals: the target's is moved by the table as well."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.errors import HandoffFailed, PeerError
from haulier.handoff import token as module
from haulier.handoff.custody import Happened, happen, record_of
from haulier.handoff.journal import HandoffRow, Journal
from haulier.handoff.messages import Job, Own, Running
from haulier.handoff.ownership import Event, State
from haulier.handoff.token import Token
from tests.handoff.test_control import Pair


class Sites:
    """A source with its token, and a target that answers by its own journal: by its worker, or by its agent alone."""

    def __init__(self, root: Path) -> None:
        self.pair = Pair()
        self.here, self.there = Journal(root / "here.sqlite"), Journal(root / "there.sqlite")
        columns = {"epoch": 3, "taken": 3, "owner": "oslo", "manifest": "guest/web1", "wanted": "running"}
        self.here.advance("web1", "absent", "owner", **columns)
        self.here.add_handoff(HandoffRow(id="h1", guest="web1", role="source", peer="lisbon"))
        self.left_alone = threading.Event()
        self.job = Job(handoff="h1", role="source", guest="web1", peer="lisbon")
        self.token = Token(self.here, self.job, "oslo", self, self.left_alone)
        self.agent_answers = True
        self.asked: list[str] = []

    def own(self, guest: str, event: str, epoch: int, handoff: str = "") -> list[tuple[str, int]]:
        self.asked.append(event)
        if not self.agent_answers:
            raise PeerError("no agent")
        return [(str(told.value), number) for told, number in self.take(Event(event), epoch).messages()]

    def take(self, event: Event, epoch: int) -> Happened:
        """The event at the target."""
        return happen(self.there, "web1", event, epoch)

    def ready(self) -> None:
        """A handoff as far as the target's word that everything is there."""
        assert self.token.begin() == 4
        self.take(Event.OFFER, 4)
        for event, epoch in self.take(Event.COMPLETE, 0).messages():
            happen(self.here, "web1", event, epoch)

    def states(self) -> tuple[State, State]:
        return record_of(self.here.find_guest("web1")).state, record_of(self.there.find_guest("web1")).state

    def answer(self, event: Event, epoch: int) -> None:
        """What the target's worker does with it, and says."""
        for told, number in self.take(event, epoch).messages():
            self.pair.b.own(told, number)


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    found = Sites(tmp_path)
    yield found
    found.here.close()
    found.there.close()


def test_the_target_takes_it(sites: Sites) -> None:
    sites.ready()
    ran: list[float] = []
    sites.token.grant(sites.pair.a)
    assert sites.token.passed and sites.pair.b.poll() == [Own("token", 4)]
    sites.pair.b.send(Running(77.0))
    sites.answer(Event.TOKEN, 4)
    sites.token.settle(sites.pair.a, ran.append)
    row = sites.here.guest("web1")
    assert ran == [77.0] and (row.owner, row.wanted) == ("lisbon", "")
    assert sites.states()[1] is State.OWNER and sites.states()[0] is not State.OWNER
    assert sites.asked == []


def test_the_worker_is_not_heard_and_its_agent_is(sites: Sites) -> None:
    sites.ready()
    sites.token.grant(sites.pair.a)
    sites.left_alone.set()
    sites.token.settle(sites.pair.a, lambda _: None)
    assert sites.asked == ["token"]
    assert sites.states()[1] is State.OWNER and sites.states()[0] is not State.OWNER


def test_a_refusal_gives_it_back(sites: Sites) -> None:
    sites.ready()
    sites.token.grant(sites.pair.a)
    # The target lost everything, and so what it had voted for.
    sites.take(Event.COPY_LOST, 0)
    sites.answer(Event.TOKEN, 4)
    with pytest.raises(HandoffFailed, match=r"site 'lisbon' refused the token; guest 'web1' belongs to 'oslo' again"):
        sites.token.settle(sites.pair.a, lambda _: None)
    assert sites.token.granted and not sites.token.passed
    assert sites.states()[0] is State.OWNER and sites.states()[1] is not State.OWNER


def test_nobody_is_heard(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGENT_S", 0.01)
    sites.ready()
    sites.token.grant(sites.pair.a)
    sites.agent_answers = False
    sites.left_alone.set()
    with pytest.raises(HandoffFailed, match="the agents go on asking"):
        sites.token.settle(sites.pair.a, lambda _: None)
    assert sites.token.passed, "nobody may run it here"
    assert sites.states()[0] is State.GRANTED


def test_called_off_before_the_grant(sites: Sites) -> None:
    sites.token.begin()
    sites.take(Event.OFFER, 4)
    sites.token.call_off(sites.pair.a)
    assert sites.token.tell_agent(0) == "" and sites.asked == ["abort"]
    assert sites.states()[0] is State.OWNER and sites.states()[1] is not State.OWNER
    sites.agent_answers = False
    assert "no agent" in sites.token.tell_agent(0.1)
    assert len(sites.asked) >= 3, "asked again while there was patience"


def test_only_one_handoff_at_a_time(sites: Sites) -> None:
    sites.token.begin()
    other = Token(sites.here, sites.job, "oslo", sites, sites.left_alone)
    with pytest.raises(HandoffFailed):
        other.begin()
    assert not other.epoch
