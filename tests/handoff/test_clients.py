"""What a guest's clients notice: the operator's hook, and the ends of tunnels around a handoff."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from haulier.errors import HandoffFailed, UsageError
from haulier.guests.model import GuestSpec
from haulier.handoff import clients
from haulier.handoff.messages import Stretch, Stretched, decode, encode
from haulier.network import tunnel
from tests.handoff.hosts import GUEST, SPEC, Host, Hosts

KEEP = msgspec.structs.replace(SPEC, net="keep")
NEWS = Stretch(vni=9, home="192.0.2.1", away="192.0.2.2", gateway_mac="02:68:61:75:6c:01")


class FakeKernel:
    """Remembers which ends are there and which of them lead away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: dict[str, bool] = {}
        self.refuses = ""
        monkeypatch.setattr(tunnel, "up", self._up)
        monkeypatch.setattr(tunnel, "down", lambda t: self.ends.pop(f"{t.owner[-6:]} {t.role}", None))
        monkeypatch.setattr(tunnel, "lead", self._lead)
        monkeypatch.setattr(tunnel, "mac_of", lambda bridge: NEWS.gateway_mac)

    def _up(self, made: tunnel.Tunnel) -> None:
        if self.refuses:
            raise UsageError(self.refuses)
        self.ends[f"{made.owner[-6:]} {made.role}"] = False

    def _lead(self, made: tunnel.Tunnel, there: bool) -> None:
        self.ends[f"{made.owner[-6:]} {made.role}"] = there


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    return FakeKernel(monkeypatch)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path, monkeypatch)
    yield hosts
    hosts.close()


@pytest.fixture
def oslo(hosts: Hosts) -> Host:
    return hosts.oslo


@pytest.fixture
def lisbon(hosts: Hosts) -> Host:
    return hosts.lisbon


# -- the hook --------------------------------------------------------------------------------------------------------


def test_the_hook_is_told_and_its_failure_undoes_nothing(lisbon: Host, tmp_path: Path) -> None:
    assert clients.call_moved_hook(lisbon.site, SPEC, "oslo") == (0.0, False)
    for missing in ("/nonexistent/hook", "/bin/false"):
        object.__setattr__(lisbon.site, "moved_hook", missing)
        assert not clients.call_moved_hook(lisbon.site, SPEC, "oslo").worked
    hook = tmp_path / "hook"
    hook.write_text(f'#!/bin/sh\n(echo "$@"; env | grep ^HAULIER_ | sort) > {tmp_path}/told\n')
    hook.chmod(0o755)
    object.__setattr__(lisbon.site, "moved_hook", str(hook))
    assert clients.call_moved_hook(lisbon.site, SPEC, "oslo").worked
    told = (tmp_path / "told").read_text().splitlines()
    assert told[0] == f"{GUEST} 10.77.0.10 oslo lisbon"
    assert f"HAULIER_MAC={SPEC.mac}" in told and "HAULIER_NEW_SITE_ADDRESSES=127.0.0.1" in told


def test_a_hook_that_hangs_is_given_up(lisbon: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "HOOK_S", 0.1)
    hook = tmp_path / "hook"
    hook.write_text("#!/bin/sh\nexec sleep 60\n")
    hook.chmod(0o755)
    object.__setattr__(lisbon.site, "moved_hook", str(hook))
    hooked = clients.call_moved_hook(lisbon.site, SPEC, "oslo")
    assert not hooked.worked and hooked.seconds < 30


# -- tunnels ---------------------------------------------------------------------------------------------------------


def test_messages_survive_the_wire() -> None:
    assert decode(encode(NEWS)) == NEWS and decode(encode(Stretched("no"))) == Stretched("no")


def test_there_and_back_leaves_nothing(oslo: Host, lisbon: Host, kernel: FakeKernel) -> None:
    news = clients.stretch(oslo.site, KEEP, "h1", "lisbon", "127.0.0.9")
    assert news is not None and (news.home, news.away) == ("127.0.0.1", "127.0.0.9")
    assert clients.receive(lisbon.site, KEEP, "oslo", news) == ""
    assert list(kernel.ends.values()) == [False, False]
    clients.left(oslo.site, GUEST)
    clients.coming(lisbon.site, GUEST)
    clients.arrived(lisbon.site, lisbon.journal, KEEP, "oslo")
    clients.gone(oslo.site, GUEST)
    assert sorted(kernel.ends.values()) == [False, True], "home leads"
    # Back: this tunnel's other end is where it goes.
    assert clients.stretch(lisbon.site, KEEP, "h2", "oslo", "127.0.0.1") is None
    clients.left(lisbon.site, GUEST)
    clients.coming(oslo.site, GUEST)
    assert set(kernel.ends.values()) == {False}, "before it runs, nothing leaves any more"
    clients.arrived(oslo.site, oslo.journal, KEEP, "lisbon")
    clients.gone(lisbon.site, GUEST)
    assert kernel.ends == {}
    assert clients.records(oslo.site).all() == clients.records(lisbon.site).all() == []


def test_a_guest_that_moves_on_keeps_the_way_through_its_last_site(lisbon: Host, kernel: FakeKernel) -> None:
    assert clients.receive(lisbon.site, KEEP, "oslo", NEWS) == ""
    assert clients.stretch(lisbon.site, KEEP, "h2", "quito", "127.0.0.9") is not None
    clients.left(lisbon.site, GUEST)
    clients.gone(lisbon.site, GUEST)
    assert [(t.role, t.peer) for t in clients.records(lisbon.site).all()] == [("away", "oslo"), ("home", "quito")]


def test_a_failed_handoff_takes_its_tunnel_away(oslo: Host, kernel: FakeKernel) -> None:
    for given in (False, True):
        assert clients.stretch(oslo.site, KEEP, "h1", "lisbon", "127.0.0.9") is not None
        if given:
            clients.left(oslo.site, GUEST)
        clients.stayed(oslo.site, GUEST)
        assert kernel.ends == {} and clients.records(oslo.site).all() == []


def test_an_address_that_cannot_be_kept_stops_the_handoff_before_it_begins(
    oslo: Host, lisbon: Host, kernel: FakeKernel
) -> None:
    assert clients.stretch(oslo.site, SPEC, "h1", "lisbon", "127.0.0.9") is None, "only where it is asked for"
    kernel.refuses = "no vxlan in this kernel"
    with pytest.raises(HandoffFailed, match=r"no vxlan in this kernel.*guest net web1 hook"):
        clients.stretch(oslo.site, KEEP, "h1", "lisbon", "127.0.0.9")
    assert clients.receive(lisbon.site, KEEP, "oslo", NEWS) == "no vxlan in this kernel"
    kernel.refuses = ""
    bad = msgspec.structs.replace(NEWS, gateway_mac="; reboot")
    assert "no MAC" in clients.receive(lisbon.site, KEEP, "oslo", bad), "what a peer says is checked"
    assert clients.records(oslo.site).all() == clients.records(lisbon.site).all() == []


def test_a_policy_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="hook, keep or mptcp"):
        GuestSpec(**{**msgspec.structs.asdict(SPEC), "net": "bgp"})
