"""Which handoffs of others a site is a waypoint of."""

from __future__ import annotations

import socket

import pytest

from haulier.agent import waypoints as module
from haulier.agent.client import Client
from haulier.errors import Conflict, NoRoom, UnknownThing, UsageError
from haulier.handoff.journal import SiteRow
from tests.agent.conftest import Fleet
from tests.support.waiting import wait_for


def also(fleet: Fleet, name: str) -> None:
    """Lisbon knows one site more, at this host."""
    journal = fleet.at_lisbon.journal
    journal.put_sites([*journal.sites(), SiteRow(name, "127.0.0.1:7440", ("127.0.0.1",))])


def test_a_site_leads_to_another_of_the_fleet_until_it_is_told_that_it_is_over(fleet: Fleet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as worker:
        port = int(worker.getsockname()[1])
        also(fleet, "porto")
        host, chosen = fleet.to_lisbon().open_waypoint("h1", "porto", port)
        with socket.create_connection((host, chosen), 10) as sock:
            came, _ = worker.accept()
            with came:
                sock.sendall(b"hello")
                assert came.recv(5) == b"hello"
                (fact,) = Client.local(fleet.lisbon).get("/v1/doctor/network")["waypoints"]
                assert fact["source"] == "oslo" and fact["handoff"] == "h1"
                wait_for(lambda: fleet.at_lisbon.waypoints.facts()[0]["carried"] == 5, 10)
                with pytest.raises(Conflict, match="already"):
                    fleet.to_lisbon().open_waypoint("h1", "porto", port)
                assert fleet.to_lisbon().close_waypoint("h1") == 5
                assert came.recv(1) == b"" and sock.recv(1) == b""
        assert fleet.at_lisbon.waypoints.facts() == []
        assert fleet.to_lisbon().close_waypoint("h1") == 0


@pytest.mark.parametrize(
    ("to", "port", "error"),
    [
        ("porto", 7441, UnknownThing),
        ("oslo", 7441, UsageError),
        ("lisbon", 7441, Conflict),
        ("bergen", 22, UsageError),
        ("bergen", 1 << 16, UsageError),
    ],
)
def test_it_leads_nowhere_else(fleet: Fleet, to: str, port: int, error: type[Exception]) -> None:
    also(fleet, "bergen")
    with pytest.raises(error):
        fleet.to_lisbon().open_waypoint("h1", to, port)
    assert fleet.at_lisbon.waypoints.facts() == []


def test_there_are_only_so_many(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 1)
    also(fleet, "porto")
    fleet.to_lisbon().open_waypoint("h1", "porto", 7441)
    with pytest.raises(NoRoom, match="leave it out"):
        fleet.to_lisbon().open_waypoint("h2", "porto", 7441)
    fleet.to_lisbon().close_waypoint("h1")
    fleet.to_lisbon().open_waypoint("h2", "porto", 7441)
