"""Who may call what, and what becomes of requests that make no sense."""

from __future__ import annotations

import json
import socket
import ssl
from pathlib import Path

import pytest

from haulier.agent import authority
from haulier.agent.client import Client
from haulier.agent.routes import Access
from haulier.agent.server import MAX_BODY, _only_one, route_table
from haulier.agent.site import Site
from haulier.errors import Conflict, HaulierError, NoRoom, NotTrusted, PeerError, UnknownThing, UsageError
from haulier.handoff.journal import SiteRow
from tests.agent.conftest import Fleet
from tests.support.agents import join, make_site, running


def fill(path: str) -> str:
    return path.replace("{name}", "web1").replace("{id}", "h123")


def anonymous(fleet: Fleet) -> Client:
    return Client.joining(fleet.oslo.control, fleet.oslo.ca_certificate.read_bytes(), "oslo")


def as_lisbon(fleet: Fleet) -> Client:
    return Client.peer(fleet.lisbon, fleet.at_lisbon.journal.site("oslo"))


def test_only_joining_is_open_to_anyone() -> None:
    assert {route.path for route in route_table() if route.access is Access.ANYONE} == {"/v1/join"}
    for route in route_table():
        assert route.path.startswith("/v1/peer/") == (route.access is Access.SITE)
        if route.access is Access.FLEET and not route.path.startswith("/v1/coordinator"):
            # the coordinator is told by each site about itself
            assert route.method == "GET", "another site changes nothing here outside a handoff"


@pytest.mark.parametrize("route", route_table(), ids=lambda route: f"{route.method} {route.path}")
def test_access_without_certificate_and_by_another_site(fleet: Fleet, route) -> None:
    if route.access is Access.ANYONE:
        return
    with pytest.raises(NotTrusted, match="needs the certificate"):
        anonymous(fleet).call(route.method, fill(route.path), {} if route.method == "POST" else None)
    if route.access is Access.OPERATOR:
        with pytest.raises(NotTrusted, match="for the operator"):
            as_lisbon(fleet).call(route.method, fill(route.path), {} if route.method == "POST" else None)
    if route.access is Access.SITE:
        with pytest.raises(NotTrusted, match="for other sites"):
            fleet.client.call(route.method, fill(route.path), {})


def test_a_certificate_of_another_fleet_is_refused(fleet: Fleet, short: Path) -> None:
    stranger = make_site(short / "x", "lisbon")
    # it does not trust us either; let it, to see what our side says
    stranger_ca = fleet.oslo.ca_certificate.read_bytes()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(stranger.certificate, stranger.key)
    context.load_verify_locations(cadata=stranger_ca.decode())
    host, port = fleet.oslo.control.split(":")
    with (
        pytest.raises((ssl.SSLError, ConnectionError)),
        socket.create_connection((host, int(port))) as raw,
        context.wrap_socket(raw, server_hostname="oslo.haulier") as secure,
    ):
        secure.sendall(b"GET /v1/site HTTP/1.1\r\nHost: x\r\n\r\n")
        assert not secure.recv(100)
        raise ConnectionError
    with pytest.raises(NotTrusted, match="not this fleet's"):
        Client.peer(stranger, SiteRow("oslo", fleet.oslo.control)).site()


def test_another_sites_certificate_is_not_taken_for_the_one_called(fleet: Fleet) -> None:
    with pytest.raises(NotTrusted, match="another site's"):
        Client.peer(fleet.oslo, SiteRow("porto", fleet.lisbon.control)).site()


def test_a_certified_site_that_the_fleet_does_not_know_is_refused(fleet: Fleet, short: Path) -> None:
    join(fleet.oslo, short / "p", "porto")
    porto = Site.load(short / "p")
    with fleet.at_oslo.journal.transaction():
        fleet.at_oslo.journal._db.execute("DELETE FROM sites WHERE name='porto'")
    with pytest.raises(NotTrusted, match="'porto' has a certificate of this fleet but is not among its sites"):
        Client.peer(porto, SiteRow("oslo", fleet.oslo.control)).site()


def test_old_tls_is_refused(fleet: Fleet) -> None:
    context = authority.client_context(fleet.lisbon)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    host, port = fleet.oslo.control.split(":")
    with pytest.raises(ssl.SSLError), socket.create_connection((host, int(port))) as raw:
        context.wrap_socket(raw, server_hostname="oslo.haulier")


def test_a_huge_body(fleet: Fleet) -> None:
    with pytest.raises(NoRoom, match="larger than 1024 KiB"):
        fleet.client.post("/v1/guests", {"name": "x" * (MAX_BODY + 1)})
    assert fleet.client.site()["name"] == "oslo"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"name": 3}', b"\xff\xfe", b'{"a":' * 5000])
def test_bodies_that_make_no_sense(fleet: Fleet, body: bytes) -> None:
    connection = fleet.client._connect(10)
    try:
        connection.request("POST", "/v1/handoffs", body)
        response = connection.getresponse()
        assert response.status == 400
        assert json.loads(response.read())["code"] == UsageError.exit_code
    finally:
        connection.close()


def test_unknown_routes_and_methods(fleet: Fleet) -> None:
    with pytest.raises(UnknownThing, match="no GET /v2/nothing"):
        fleet.client.get("/v2/nothing")
    with pytest.raises(UsageError, match="Method Not Allowed"):
        fleet.client.delete("/v1/site")


@pytest.mark.parametrize("name", ["..", "a%2fb", "A", "%00", "x" * 300])
def test_bad_names_in_paths(fleet: Fleet, name: str) -> None:
    with pytest.raises(HaulierError) as caught:
        fleet.client.get(f"/v1/guests/{name}")
    assert caught.value.exit_code in (2, 3)


def test_an_error_inside_does_not_end_the_agent(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> list[object]:
        raise ZeroDivisionError

    monkeypatch.setattr(fleet.at_oslo.guests, "list", explode)
    with pytest.raises(HaulierError, match="failed inside the agent"):
        fleet.client.guests()
    assert fleet.client.site()["name"] == "oslo"


def test_the_local_socket_is_for_the_owner_only(fleet: Fleet) -> None:
    assert fleet.oslo.socket.stat().st_mode & 0o777 == 0o600
    assert fleet.oslo.run.stat().st_mode & 0o777 == 0o700


def test_nothing_else_listens(fleet: Fleet) -> None:
    import psutil

    listening = {
        f"{c.laddr.ip}:{c.laddr.port}" for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"
    }
    assert listening == {fleet.oslo.control, fleet.lisbon.control}


def test_one_agent_a_site(fleet: Fleet) -> None:
    with _only_one(fleet.oslo, "agent"), pytest.raises(Conflict, match="runs already"), _only_one(fleet.oslo, "agent"):
        pass


def test_a_peer_that_speaks_nonsense(short: Path) -> None:
    site = make_site(short / "s", "oslo")
    site.run.mkdir(exist_ok=True)
    for answer in (
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 500 X\r\nContent-Length: 2\r\n\r\n{}",
        b"\0\1",
    ):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(site.socket))
            listener.listen()
            import threading

            def serve(data: bytes = answer, at: socket.socket = listener) -> None:
                connection, _ = at.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(data)

            thread = threading.Thread(target=serve)
            thread.start()
            with pytest.raises(PeerError):
                Client.local(site).site()
            thread.join()
        site.socket.unlink()


def test_an_agent_that_starts_takes_away_the_mptcp_of_a_worker_that_was_killed(short: Path) -> None:
    site = make_site(short / "o", "oslo")
    left = site.run / "mptcp"
    left.write_text('{"users": [{"pid": 1, "ticks": 1, "boot": "an earlier one"}], "numbers": {}, "steps": []}')
    with running(site):
        assert not left.exists()
