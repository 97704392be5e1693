"""The connection of an offer becomes the first path of the workers' session, through real agents and real sockets."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.agent import client as clients
from haulier.agent.client import Client
from haulier.agent.site import Site
from haulier.errors import Conflict
from haulier.session import PathAddress, Session, Settings, TlsConfig
from haulier.units import MIB
from tests.agent.conftest import Fleet
from tests.agent.test_offers import accepted, capable, make_offer  # noqa: F401
from tests.support.agents import join, make_site, running
from tests.support.relay import TcpRelay
from tests.support.waiting import wait_for

SECRET = bytes.fromhex("ab" * 32)
QUICK = Settings(stall_s=0.3, ping_s=0.2, dead_s=0.8, redial_most_s=0.3, dial_s=0.5)


def tls(site: Site, peer: str) -> TlsConfig:
    return TlsConfig(site.certificate, site.key, site.ca_certificate, peer)


class Worker:
    """The target's worker: its session, the way to it that is dialled, and what it got."""

    def __init__(self, site: Site) -> None:
        site.handoff_root("h123").mkdir(parents=True)
        self.socket = site.offer_socket("h123")
        self.session = Session.listen(tls(site, "oslo"), SECRET, ["127.0.0.1"], settings=QUICK, handed_at=self.socket)
        self.way = TcpRelay(self.session.port)
        self.got: list[bytes] = []
        self.session.on(1, self.got.append)

    def join(self, oslo: Site, lisbon: Client) -> Session:
        """The source's session, begun on the connection of its offer."""
        answer, handed = lisbon.offer_on(make_offer())
        assert answer["port"] == 7 and handed is not None
        assert abs(handed.clock_offset) < 5, "it is the same clock"
        return Session.connect(
            tls(oslo, "lisbon"), SECRET, [PathAddress("127.0.0.1", self.way.port)], QUICK, handed=handed
        )

    def close(self) -> None:
        self.session.close(0)
        self.way.close()


@pytest.fixture
def worker(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    accepted(monkeypatch)
    found = Worker(fleet.lisbon)
    yield found
    found.close()
    end_children(fleet.at_lisbon)


def end_children(agent) -> None:  # type: ignore[no-untyped-def]
    for process in agent.core.children:
        process.stdin.close()
        process.wait(10)


def test_little_goes_over_the_connection_of_the_offer(fleet: Fleet, worker: Worker) -> None:
    back: list[bytes] = []
    worker.session.send(2, b"said before anybody was there")
    source = worker.join(fleet.oslo, fleet.to_lisbon())
    assert not worker.socket.exists(), "one connection is all that can be handed over"
    source.on(2, back.append)
    for n in range(20):
        source.send(1, bytes([n]) * 1000)
    wait_for(lambda: len(worker.got) == 20 and back, 10)
    assert worker.got == [bytes([n]) * 1000 for n in range(20)]
    assert [path.up for path in worker.session.paths()] == [True]
    source.close()
    assert worker.session.wait_over(10) and worker.session.error is None and source.error is None
    assert worker.way.carried == 0, "nobody dialled"


def test_who_has_more_to_say_dials_and_lets_it_go(fleet: Fleet, worker: Worker) -> None:
    source = worker.join(fleet.oslo, fleet.to_lisbon())
    sent = [bytes([n]) * 100_000 for n in range(80)]
    for half in (sent[:40], sent[40:]):
        for message in half:
            source.send(1, message)
        assert source.wait_below(0, timeout=30)
        for session in (source, worker.session):
            wait_for(lambda session=session: [path.up for path in session.paths()] == [True, False], 10)
    wait_for(lambda: len(worker.got) == len(sent), 10)
    assert worker.got == sent
    assert worker.way.carried > 3 * MIB, "what was said later went the way that was dialled"
    source.close()
    assert worker.session.wait_over(10) and worker.session.error is None


def test_no_other_session_gets_in(fleet: Fleet, worker: Worker) -> None:
    source = worker.join(fleet.oslo, fleet.to_lisbon())
    other = Session.connect(tls(fleet.oslo, "lisbon"), SECRET, [PathAddress("127.0.0.1", worker.session.port)], QUICK)
    assert other.wait_over(10) and isinstance(other.error, Conflict)
    source.close()
    other.close()


def test_a_session_outlives_the_agent_that_passed_it_on(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oslo = make_site(short / "o", "oslo")
    accepted(monkeypatch)
    with running(oslo) as at_oslo:
        lisbon = join(oslo, short / "l", "lisbon")
        worker = Worker(lisbon)
        with running(lisbon) as at_lisbon:
            source = worker.join(oslo, Client.peer(oslo, at_oslo.journal.site("lisbon")))
            source.send(1, b"before")
            wait_for(lambda: worker.got == [b"before"], 10)
            assert worker.way.carried == 0
            end_children(at_lisbon)
        source.send(1, b"after")
        wait_for(lambda: worker.got == [b"before", b"after"], 10)
        assert worker.way.carried > 0
        source.close()
        worker.close()


def test_a_worker_that_ends_ends_the_connection(fleet: Fleet, worker: Worker) -> None:
    source = worker.join(fleet.oslo, fleet.to_lisbon())
    # To the source the connection stands before the worker has taken it.
    source.send(1, b"before")
    wait_for(lambda: worker.got == [b"before"], 10)
    worker.session.abort("the disk is full")
    assert source.wait_over(10)
    assert "the disk is full" in str(source.error)
    source.close()


def test_where_no_worker_waits_the_offer_is_answered_as_ever(fleet: Fleet, worker: Worker) -> None:
    worker.session.close(0)
    assert not worker.socket.exists()
    answer, handed = fleet.to_lisbon().offer_on(make_offer())
    assert answer["port"] == 7 and handed is None
    assert fleet.to_lisbon().offer(make_offer()) == answer


def test_nothing_is_handed_over_to_another_version(
    fleet: Fleet, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "PATH_VERSION", "1")
    answer, handed = fleet.to_lisbon().offer_on(make_offer())
    assert answer["port"] == 7 and handed is None and worker.socket.exists()


@pytest.mark.parametrize("said", ["", "2", "2 1.0", "1 1.0 2.0", "2 now then", "2 1 2 3"])
def test_what_a_target_says_of_it_is_checked(said: str) -> None:
    with pytest.raises(http.client.HTTPException):
        clients._clock(said)
