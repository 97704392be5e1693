"""An agent makes each tunnel what the journal says it should be, and listens only to whom it may."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from haulier.agent.addresses import Addresses
from haulier.agent.core import Core
from haulier.agent.site import Site
from haulier.agent.tunnels import NetRequest, RoutedMessage, Tunnels
from haulier.errors import Conflict, NotTrusted, UsageError
from haulier.handoff import readdressing
from haulier.handoff.journal import GuestRow, HandoffRow
from haulier.network import tunnel
from haulier.network.tunnel import Tunnel
from tests.handoff.hosts import SPEC
from tests.support.agents import make_site

HOME = Tunnel(
    guest="web1",
    role="home",
    peer="lisbon",
    owner="o",
    vni=9,
    local="192.0.2.1",
    remote="192.0.2.2",
    mac=SPEC.mac,
    address="10.77.0.10",
    bridge="br0",
)
AWAY = msgspec.structs.replace(HOME, role="away", gateway_mac="02:00:00:00:77:01", table=7501)


class Kernel:
    """What `ip` would have done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: dict[str, bool] = {}
        self.count = 0
        for name, does in {
            "up": lambda t: self.ends.update({t.role: False}),
            "down": lambda t: self.ends.pop(t.role, None),
            "lead": lambda t, there: self.ends.update({t.role: there}),
            "there": lambda t: t.role in self.ends,
            "packets": lambda t: self.count,
        }.items():
            monkeypatch.setattr(tunnel, name, does)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


@pytest.fixture
def site(short: Path) -> Site:
    return make_site(short / "o", "oslo")


@pytest.fixture
def tunnels(site: Site, kernel: Kernel) -> Iterator[Tunnels]:
    core = Core(site)
    yield Tunnels(core, Addresses(core))
    core.close()


def guest(tunnels: Tunnels, state: str, owner: str = "oslo") -> None:
    row = GuestRow(name="web1", state=state, owner=owner, epoch=3, taken=3, spec=msgspec.to_builtins(SPEC))
    facts = {name: getattr(row, name) for name in ("owner", "epoch", "taken", "spec")}
    before = tunnels.core.journal.find_guest("web1")
    tunnels.core.journal.advance("web1", before.state if before else "absent", state, **facts)


def test_a_home_end_leads_while_the_guest_is_away_also_after_the_host_was_restarted(
    tunnels: Tunnels, kernel: Kernel
) -> None:
    tunnels.records.open(HOME)
    guest(tunnels, "away", "lisbon")
    tunnels.supervise()
    assert kernel.ends == {"home": True}, "the worker that should have led it died"
    kernel.ends.clear()
    tunnels.supervise()
    assert kernel.ends == {"home": True}


def test_what_is_needed_no_more_goes(tunnels: Tunnels, kernel: Kernel) -> None:
    guest(tunnels, "owner")
    tunnels.records.open(HOME)
    tunnels.supervise()
    assert kernel.ends == {} and tunnels.records.all() == [], "the guest is here"
    tunnels.records.open(AWAY)
    tunnels.supervise()
    assert list(kernel.ends) == ["away"], "its clients come this way"
    guest(tunnels, "away", "lisbon")
    tunnels.records.open(HOME)
    tunnels.supervise()
    assert sorted(kernel.ends) == ["away", "home"], "a chain"
    tunnels.records.close("web1", "home")
    tunnels.supervise()
    assert kernel.ends == {} and tunnels.records.all() == [], "nothing leads on from here"


def test_workers_are_left_alone(tunnels: Tunnels, kernel: Kernel) -> None:
    guest(tunnels, "owner")
    tunnels.records.open(HOME)
    tunnels.core.journal.add_handoff(HandoffRow("h1", "web1", "source", "lisbon"))
    tunnels.supervise()
    assert list(kernel.ends) == ["home"]
    tunnels.core.journal.end_handoff("h1", "failed")
    tunnels.supervise()
    assert kernel.ends == {}


def test_a_tunnel_goes_when_a_hook_has_run_and_it_is_quiet(
    tunnels: Tunnels, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("haulier.agent.tunnels.time.monotonic", lambda: now)
    guest(tunnels, "away", "lisbon")
    tunnels.records.open(HOME)
    for moment, packets, is_there in ((100, 1, True), (200, 1, True), (86_000, 1, True)):
        now, kernel.count = moment, packets
        tunnels.supervise()
        assert bool(kernel.ends) is is_there, moment
    with pytest.raises(NotTrusted, match="quito"):
        tunnels.routed(RoutedMessage("web1"), "quito")
    tunnels.routed(RoutedMessage("web1"), "lisbon")
    now, kernel.count = 86_001, 2
    tunnels.supervise()
    assert kernel.ends == {"home": True}, "something still came this way"
    now = 86_007
    tunnels.supervise()
    assert kernel.ends == {} and tunnels.records.all() == []


def test_without_a_hook_it_goes_after_a_day_of_silence(
    tunnels: Tunnels, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("haulier.agent.tunnels.time.monotonic", lambda: now)
    guest(tunnels, "away", "lisbon")
    tunnels.records.open(HOME)
    tunnels.supervise()
    now = 100 + 86_401
    tunnels.supervise()
    assert kernel.ends == {}


def test_a_policy_is_changed_where_the_guest_is(tunnels: Tunnels) -> None:
    guest(tunnels, "owner")
    assert tunnels.set_net("web1", NetRequest("keep")) == {"guest": "web1", "net": "keep"}
    assert tunnels.core.journal.guest("web1").spec["net"] == "keep"
    with pytest.raises(UsageError, match="hook, keep or mptcp"):
        tunnels.set_net("web1", NetRequest("bgp"))
    with pytest.raises(UsageError, match="no addresses for guests"):
        tunnels.set_net("web1", NetRequest("mptcp"))
    guest(tunnels, "away", "lisbon")
    with pytest.raises(Conflict, match="owns"):
        tunnels.set_net("web1", NetRequest("hook"))


def test_the_doctor_tells_of_uplinks_tunnels_and_mptcp(tunnels: Tunnels, kernel: Kernel) -> None:
    tunnels.records.open(HOME)
    found = tunnels.facts()
    (shown,) = found["tunnels"]
    assert (shown["guest"], shown["role"], shown["peer"], shown["leads"]) == ("web1", "home", "lisbon", False)
    assert isinstance(found["uplinks"], list) and isinstance(found["mptcp"]["available"], bool)


def test_a_tunnel_ahead_goes_with_its_handoff_and_the_guest_gives_the_address_up(
    tunnels: Tunnels, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgot: list[str] = []
    monkeypatch.setattr(readdressing, "forget", lambda site, guest, mac, address: forgot.append(address))
    guest(tunnels, "owner")
    tunnels.records.open(msgspec.structs.replace(AWAY, ahead=True, address="10.78.2.9"))
    tunnels.supervise()
    assert kernel.ends == {} and forgot == ["10.78.2.9"], "its worker died here"
    guest(tunnels, "absent")
    tunnels.records.open(msgspec.structs.replace(HOME, ahead=True))
    tunnels.supervise()
    assert kernel.ends == {} and len(forgot) == 1, "and at the target"


def test_the_site_that_the_guest_went_to_may_end_the_tunnel(tunnels: Tunnels, kernel: Kernel) -> None:
    guest(tunnels, "away", "lisbon")
    tunnels.records.open(HOME)
    with pytest.raises(NotTrusted):
        tunnels.routed(RoutedMessage("web1", over=True), "quito")
    tunnels.routed(RoutedMessage("web1", over=True), "lisbon")
    assert kernel.ends == {}
