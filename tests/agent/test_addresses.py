"""An agent gives its guests their addresses: of the site's pool, by DHCP, and to new guests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from haulier.agent.addresses import Addresses
from haulier.agent.core import Core
from haulier.agent.site import Site
from haulier.errors import GuestError, NoRoom, UsageError
from haulier.handoff import clients, readdressing
from haulier.handoff.journal import GuestRow, Journal
from haulier.network import iproute, tunnel
from haulier.network.dhcp import Dhcp, Host
from haulier.network.pool import Pool
from tests.agent.test_tunnels import HOME
from tests.handoff.hosts import SPEC
from tests.support.agents import make_site


@pytest.fixture
def site(short: Path) -> Site:
    return make_site(short / "o", "oslo")


@pytest.fixture
def addresses(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Addresses]:
    for name in ("up", "down"):
        monkeypatch.setattr(tunnel, name, lambda made: None)
    core = Core(site)
    yield Addresses(core)
    core.close()


def guest(addresses: Addresses, state: str, owner: str = "oslo", name: str = "web1", **changes: str) -> None:
    spec = msgspec.to_builtins(msgspec.structs.replace(SPEC, name=name, **changes))
    row = GuestRow(name=name, state=state, owner=owner, epoch=3, taken=3, spec=spec)
    facts = {field: getattr(row, field) for field in ("owner", "epoch", "taken", "spec")}
    before = addresses.core.journal.find_guest(name)
    addresses.core.journal.advance(name, before.state if before else "absent", state, **facts)


@pytest.fixture
def addressed(addresses: Addresses, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The site has a pool; the list names the guests that were given their address."""
    settled: list[str] = []

    def settle(site: Site, journal: Journal, guest: str) -> dict[str, object]:
        settled.append(guest)
        row = journal.guest(guest)
        address = addresses.leases.take(guest)
        journal.advance(guest, "owner", "owner", spec={**row.spec, "site_address": address})
        return {}

    monkeypatch.setattr(readdressing, "settle", settle)
    monkeypatch.setattr(iproute, "run", lambda words, given=None: "")
    addresses.leases.pool = Pool.parse("10.78.1.0/24")
    return settled


def follow(addresses: Addresses) -> None:
    row = addresses.core.journal.guest("web1")
    addresses.core.journal.advance("web1", row.state, row.state, spec={**row.spec, "net": "mptcp"}, wanted="running")


def test_a_guest_that_has_no_address_of_this_site_yet_is_given_it_once(
    addresses: Addresses, addressed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    guest(addresses, "owner")
    addresses.supervise()
    assert addressed == [], "by its policy only"
    follow(addresses)
    addresses.supervise()
    addresses.supervise()
    assert addressed == ["web1"] and addresses.leases.of("web1") in addresses.leases.check()


def test_a_guest_that_cannot_be_told_is_asked_again_later_and_not_all_the_time(
    addresses: Addresses, addressed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def settle(site: Site, journal: Journal, guest: str) -> dict[str, object]:
        tries.append(guest)
        raise GuestError("no agent answers")

    monkeypatch.setattr(readdressing, "settle", settle)
    now = 100.0
    monkeypatch.setattr("haulier.agent.addresses.time.monotonic", lambda: now)
    guest(addresses, "owner")
    follow(addresses)
    addresses.supervise()
    addresses.supervise()
    assert tries == ["web1"]
    now += 60
    addresses.supervise()
    assert tries == ["web1", "web1"]


def test_a_lease_ends_with_the_guest_but_not_while_a_tunnel_leads_from_it(
    addresses: Addresses, addressed: list[str]
) -> None:
    guest(addresses, "owner")
    follow(addresses)
    addresses.supervise()
    address = addresses.leases.of("web1")
    clients.records(addresses.site).open(msgspec.structs.replace(HOME, address=address))
    guest(addresses, "away", "lisbon")
    addresses.supervise()
    assert addresses.leases.of("web1") == address
    clients.records(addresses.site).close("web1", "home")
    addresses.supervise()
    assert addresses.leases.of("web1") == ""


def test_auto_is_an_address_that_no_guest_has_that_began_here(
    addresses: Addresses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "length_of", lambda bridge, address: 24)
    with pytest.raises(UsageError, match="guest_addresses"):
        addresses.choose("web9")
    object.__setattr__(addresses.site, "guest_addresses", "10.77.0.100-10.77.0.101")
    first = addresses.choose("web1")
    guest(addresses, "away", "lisbon", address=first)
    second = addresses.choose("web1")
    assert {first, second} == {"10.77.0.100/24", "10.77.0.101/24"}, "it took the first one along"
    guest(addresses, "owner", name="web2", address=second)
    with pytest.raises(NoRoom, match="guest_addresses"):
        addresses.choose("web3")


def test_dhcp_serves_the_guests_that_are_here(addresses: Addresses, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[list[Host]] = []
    ended: list[bool] = []
    monkeypatch.setattr(Dhcp, "serve", lambda self, hosts: served.append(list(hosts)))
    monkeypatch.setattr(Dhcp, "stop", lambda self: ended.append(True))
    guest(addresses, "owner")
    addresses.supervise()
    assert served == ended == [], "only where site.toml says so"
    object.__setattr__(addresses.site, "dhcp", True)
    addresses.dhcp.directory.mkdir()
    addresses.supervise()
    guest(addresses, "away", "lisbon")
    addresses.supervise()
    assert served == [[Host("web1", SPEC.mac, "10.77.0.10")], []]
    object.__setattr__(addresses.site, "dhcp", False)
    addresses.supervise()
    assert ended == [True]
