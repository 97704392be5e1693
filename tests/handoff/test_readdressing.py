"""Clients' connections move on to an address of the new site: what a guest is asked, and what is left if it fails."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from haulier.chunks.store import ChunkStore
from haulier.errors import Cancelled, GuestError, HaulierError, UsageError
from haulier.guests.agent import Finished
from haulier.guests.model import GuestSpec
from haulier.handoff import clients, readdressing
from haulier.handoff.messages import Job, Stretch
from haulier.handoff.ownership import State
from haulier.handoff.residence import spec_of
from haulier.handoff.source import SourceHandoff
from haulier.network import announce, iproute, tunnel
from tests.handoff.hosts import GUEST, HANDOFF, SPEC, Host, Hosts
from tests.handoff.test_clients import FakeKernel

OLD, NEW = "10.78.1.21", "10.78.2.21"
MOBILE = msgspec.structs.replace(SPEC, net="mptcp", site_address=OLD)
GATEWAY_MAC = "02:68:61:75:6c:01"


class Inside:
    """A guest's agent, kernel and clients: those of `slow` join at the given look, and nobody else ever."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.joined: set[str] = set()
        self.old = {"a", "b"}
        self.slow: dict[str, int] = {}
        self.plain = 0
        self.looks = 0
        self.dead = False
        self.armed: list[str] = []

    def __call__(self, site: Any, guest: str, timeout: float = 0) -> Inside:
        if self.dead:
            raise GuestError("did not answer in time")
        return self

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def execute(self, command: str, args: dict[str, Any] | None = None) -> Any:
        if command == "guest-exec" and args is not None:
            self.armed = base64.b64decode(args["input-data"]).decode().splitlines()
            return {"pid": 1}
        return [{"name": "eth0", "hardware-address": SPEC.mac}]

    def run(self, command: list[str], input: bytes = b"", timeout: float = 0) -> Finished:
        self.lines += input.decode().splitlines()
        shown = f"-- sockets\n{self._sockets()}" if "-- sockets" in command[2] else ""
        return Finished(0, f"{OLD} id 7 signal dev eth0\n{shown}".encode(), b"")

    def check(self, command: list[str], timeout: float = 0) -> bytes:
        return self._sockets().encode()

    def _sockets(self) -> str:
        self.looks += 1
        self.joined |= {token for token, look in self.slow.items() if look <= self.looks}
        lines = [self._socket(OLD, token) for token in self.old] + [self._socket(NEW, token) for token in self.joined]
        lines += [f"0 0 {OLD}:22 10.90.0.3:{n} cubic" for n in range(self.plain)]
        return "\n".join(lines)

    def _socket(self, address: str, token: str) -> str:
        number = {"a": "0a", "b": "0b"}[token]
        return f"0 0 {address}:80 10.90.0.3:9 cubic tcp-ulp-mptcp flags:M token:0000(id:0)/{number}(id:0)"


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Inside:
    made = Inside()
    monkeypatch.setattr(readdressing, "_agent", made)
    monkeypatch.setattr(readdressing, "JOIN_S", 0.2)
    monkeypatch.setattr(announce, "announce", lambda *words: True)
    monkeypatch.setattr(iproute, "run", lambda words, given=None: "")
    return made


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    return FakeKernel(monkeypatch)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path, monkeypatch)
    for host in hosts.both:
        object.__setattr__(host.site, "pool", f"{NEW}-{NEW}" if host is hosts.lisbon else f"{OLD}-{OLD}")
    yield hosts
    hosts.close()


@pytest.fixture
def lisbon(hosts: Hosts, kernel: FakeKernel, inside: Inside) -> Host:
    """The guest has just begun to run here, and its old address comes by a tunnel."""
    host = hosts.lisbon
    spec = msgspec.to_builtins(MOBILE)
    host.journal.advance(GUEST, "absent", "owner", owner="lisbon", epoch=4, taken=4, spec=spec)
    news = clients.stretch(hosts.oslo.site, MOBILE, "h1", "lisbon", "127.0.0.9")
    assert news is not None and clients.receive(host.site, MOBILE, "oslo", news) == ""
    return host


def told(news: Stretch) -> Stretch:
    """With what the target answered."""
    return msgspec.structs.replace(news, gateway_mac=GATEWAY_MAC)


def address_of(host: Host) -> str:
    return str(host.journal.guest(GUEST).spec["site_address"])


def test_the_tunnel_keeps_the_address_of_the_site_not_the_guests_own(hosts: Hosts, lisbon: Host) -> None:
    found = [t for host in hosts.both for t in clients.records(host.site).all()]
    assert [(t.role, t.address) for t in found] == [("home", OLD), ("away", OLD)]


def test_when_all_have_joined_nothing_is_left(lisbon: Host, inside: Inside, kernel: FakeKernel) -> None:
    inside.slow = {"a": 1, "b": 3}
    done = readdressing.settle(lisbon.site, lisbon.journal, GUEST)
    assert done["address"] == NEW and done["left"] == 0 and address_of(lisbon) == NEW
    assert inside.looks == 3, "nobody was cut off who was about to join"
    told = inside.lines
    assert told.index(f"mptcp endpoint add {NEW} id 5 dev eth0 signal") < told.index(
        f"mptcp endpoint delete id 0 {OLD}"
    )
    assert "mptcp endpoint delete id 7" in told and told[-1] == f"addr del {OLD}/32 dev eth0"
    assert clients.records(lisbon.site).all() == []
    assert readdressing.settled(lisbon.site, spec_of(lisbon.journal.guest(GUEST)))


def test_clients_that_do_not_join_keep_the_old_address_and_its_tunnel(lisbon: Host, inside: Inside) -> None:
    inside.slow = {"a": 1}
    inside.plain = 2
    done = readdressing.settle(lisbon.site, lisbon.journal, GUEST)
    assert done["left"] == 3 and address_of(lisbon) == NEW
    assert not any("delete" in line or "del " in line for line in inside.lines)
    assert inside.lines[-3:] == [
        f"mptcp endpoint add {OLD} id 130 dev eth0",
        "mptcp endpoint change id 130 backup",
        "mptcp endpoint change id 7 backup",
    ]
    assert [t.role for t in clients.records(lisbon.site).all()] == ["away"]
    # Later they are looked at again.
    assert not readdressing.settled(lisbon.site, spec_of(lisbon.journal.guest(GUEST)))
    inside.slow, inside.plain = {"a": 1, "b": 1}, 0
    assert readdressing.settle(lisbon.site, lisbon.journal, GUEST)["left"] == 0
    assert clients.records(lisbon.site).all() == []


def test_an_address_that_nobody_joins_is_announced_once_more(
    lisbon: Host, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readdressing, "AGAIN_S", 0.02)
    monkeypatch.setattr(readdressing, "JOIN_S", 20.0)
    inside.slow = {"a": 4, "b": 4}
    assert readdressing.settle(lisbon.site, lisbon.journal, GUEST)["left"] == 0
    again = f"mptcp endpoint add {NEW} id 67 dev eth0 signal"
    assert inside.lines.count(again) == 1 and inside.lines.index(again) < inside.lines.index(
        f"mptcp endpoint delete id 0 {OLD}"
    )


def test_an_address_that_some_have_joined_is_not_taken_from_them(
    lisbon: Host, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readdressing, "AGAIN_S", 0.0)
    inside.slow = {"a": 1}
    assert readdressing.settle(lisbon.site, lisbon.journal, GUEST)["left"] == 1
    assert inside.looks > 1 and not any(NEW in line and "id 67" in line for line in inside.lines)


def test_plain_connections_keep_the_address_while_the_others_leave(lisbon: Host, inside: Inside) -> None:
    inside.slow, inside.plain = {"a": 1, "b": 1}, 1
    assert readdressing.settle(lisbon.site, lisbon.journal, GUEST)["left"] == 1
    assert f"mptcp endpoint delete id 0 {OLD}" in inside.lines
    assert not any(line.startswith("addr del") for line in inside.lines)
    assert [t.role for t in clients.records(lisbon.site).all()] == ["away"]


def test_a_guest_whose_agent_is_silent_stays_as_it_came(lisbon: Host, inside: Inside) -> None:
    inside.dead = True
    with pytest.raises(HaulierError):
        readdressing.settle(lisbon.site, lisbon.journal, GUEST)
    assert address_of(lisbon) == OLD and [t.role for t in clients.records(lisbon.site).all()] == ["away"]


def test_joining_ahead_there_and_called_off(hosts: Hosts, inside: Inside, kernel: FakeKernel) -> None:
    oslo, lisbon = hosts.oslo, hosts.lisbon
    oslo.journal.advance(GUEST, "absent", "offered", epoch=3, pending=4, spec=msgspec.to_builtins(MOBILE))
    news = readdressing.plan_ahead(oslo.site, GUEST, "h1", "127.0.0.9")
    assert news is not None and news.ahead and (news.home, news.away) == ("127.0.0.9", "127.0.0.1")
    assert readdressing.receive_ahead(lisbon.site, GUEST, SPEC.mac, "oslo", news) == ""
    readdressing.prepare(oslo.site, oslo.journal, GUEST, "lisbon", NEW, told(news))
    assert sorted(kernel.ends.values()) == [False, True], "what comes for the new address goes to the guest already"
    assert f"mptcp endpoint add {NEW} id 5 dev eth0 signal backup" in inside.lines
    assert readdressing.plan_ahead(oslo.site, GUEST, "h2", "127.0.0.9") is None, "one at a time"
    assert inside.armed[-5:] == [
        "mptcp endpoint change id 5 nobackup",
        f"mptcp endpoint add {OLD} id 130 dev eth0",
        "mptcp endpoint change id 130 backup",
        "mptcp endpoint change id 4 backup",
        "mptcp endpoint change id 66 backup",
    ], "when it has arrived, the new address is the one to use"
    readdressing.called_off(oslo.site, GUEST)
    assert f"addr del {NEW}/32 dev eth0" in inside.lines and clients.records(oslo.site).all() == []
    # At the target, the guest having come after all, its own end goes before it runs.
    clients.coming(lisbon.site, GUEST)
    assert list(kernel.ends.values()) == [False]
    clients.arrived(lisbon.site, lisbon.journal, MOBILE, "oslo")
    assert kernel.ends == {}


def test_joining_after_the_move_is_prepared_and_needs_no_second_tunnel(
    hosts: Hosts, inside: Inside, kernel: FakeKernel
) -> None:
    oslo = hosts.oslo
    oslo.journal.advance(GUEST, "absent", "offered", epoch=3, pending=4, spec=msgspec.to_builtins(MOBILE))
    readdressing.prepare(oslo.site, oslo.journal, GUEST, "lisbon", NEW, None)
    assert inside.lines == [] and kernel.ends == {}
    assert inside.armed[0] == f"addr replace {NEW}/32 dev eth0"
    assert f"mptcp endpoint add {NEW} id 5 dev eth0 signal" in inside.armed


def test_a_target_without_addresses_says_so(hosts: Hosts, inside: Inside, kernel: FakeKernel) -> None:
    object.__setattr__(hosts.lisbon.site, "pool", "")
    news = readdressing.plan_ahead(hosts.oslo.site, GUEST, "h1", "127.0.0.9")
    assert news is not None
    assert "no addresses" in readdressing.receive_ahead(hosts.lisbon.site, GUEST, SPEC.mac, "oslo", news)
    assert clients.records(hosts.lisbon.site).all() == []


def test_the_tunnel_ahead_goes_when_the_guest_has_left(hosts: Hosts, inside: Inside, kernel: FakeKernel) -> None:
    site = hosts.oslo.site
    hosts.oslo.journal.advance(GUEST, "absent", "offered", epoch=3, pending=4, spec=msgspec.to_builtins(MOBILE))
    assert clients.stretch(site, MOBILE, "h1", "lisbon", "127.0.0.9") is not None
    news = readdressing.plan_ahead(site, GUEST, "h1", "127.0.0.9")
    assert news is not None
    readdressing.prepare(site, hosts.oslo.journal, GUEST, "lisbon", NEW, told(news))
    clients.left(site, GUEST)
    clients.gone(site, GUEST)
    assert [(t.role, t.leads) for t in clients.records(site).all()] == [("home", True)]


def test_a_plan_says_what_stays_behind(hosts: Hosts, inside: Inside) -> None:
    inside.plain = 2
    assert any("2 connections" in text for text in readdressing.outlook(hosts.oslo.site, GUEST, OLD))
    inside.dead = True
    assert "did not answer" in readdressing.outlook(hosts.oslo.site, GUEST, OLD)[0]


def test_only_vms_with_an_address_can_have_the_policy() -> None:
    for changes in ({"address": "", "gateway": ""}, {"site_address": "lisbon"}):
        with pytest.raises(UsageError):
            GuestSpec(**{**msgspec.structs.asdict(MOBILE), **changes})
    assert tunnel.link_local(GATEWAY_MAC) == "fe80::68:61ff:fe75:6c01"


def test_a_handoff_is_called_off_whatever_the_guest_says_of_its_addresses(hosts: Hosts) -> None:
    oslo, done = hosts.oslo, []
    oslo.record(State.OWNER, 3, role="source")
    left = {name: lambda self, *of: None for name in SourceHandoff.__abstractmethods__}

    class Odd:
        def call_off(self) -> None:
            raise RecursionError("of the guest's answer")

    def fails(self: Any) -> None:
        self._joining = Odd()
        raise Cancelled("the operator cancelled")

    left |= {"_hand_over": fails, "_drop_memory": lambda self: done.append("memory")}
    kind = type("Ends", (SourceHandoff,), left)
    job = Job(handoff=HANDOFF, role="source", guest=GUEST, peer="lisbon")
    with pytest.raises(Cancelled):
        kind(oslo.site, oslo.journal, job, oslo, threading.Event()).run()
    with ChunkStore(oslo.site.store) as store:
        assert done == ["memory"] and store.leases() == []
