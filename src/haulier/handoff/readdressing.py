"""The policy `mptcp`: a guest has an address of each site that it is at, and its clients' connections move on to it.

    source  a tunnel keeps the old address, as with `keep`; a second one, from the target, lets clients join the address
            that the guest will have there, as a backup ("ahead"; otherwise they join it "after" the move)
    token   what comes for the old address follows by the first tunnel, so that nothing waits for what comes now
    target  the guest has its new address; as soon as every MPTCP connection goes by it, the old one is left; when
            nothing else goes by that either, the tunnel is taken away at both ends

Connections that cannot move, plain TCP and clients that accept no addresses, keep the old address and its tunnel, which
then is one like that of `keep`. If anything fails here, all of them do: nobody is cut off, and the agent tries again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any, Final

import msgspec

from haulier.agent.client import Client
from haulier.agent.site import Site
from haulier.errors import HaulierError
from haulier.guests import addressing
from haulier.guests.agent import GuestAgent
from haulier.guests.model import GuestSpec
from haulier.guests.tap import BRIDGE
from haulier.handoff import clients
from haulier.handoff.control import Control
from haulier.handoff.journal import Journal
from haulier.handoff.messages import Job, Stretch, Stretched
from haulier.handoff.ownership import State
from haulier.handoff.residence import guest_paths, spec_of
from haulier.network import announce, tunnel

log = logging.getLogger(__name__)

AGENT_S: Final = 10.0
JOIN_S: Final = 8.0
"""Clients that have not joined the new address by then do not accept it, or are far away. Until then those that have
are served by it already: the old one is their backup from the guest's arrival on."""
AGAIN_S: Final = 2.5
"""When nobody has joined by then, the address is announced once more: Linux gives up after a few lost packets, and the
queue of a narrow detour is full just when the guest arrives."""
POLL_S: Final = 0.05
PATIENCE_S: Final = 1.0
"""A guest that has just arrived has better things to do for so long: its clients' streams are to be full again."""


def _agent(site: Site, guest: str, timeout: float = AGENT_S) -> GuestAgent:
    return GuestAgent(guest_paths(site, guest).qga_sock, name=guest, timeout=timeout)


def outlook(site: Site, guest: str, address: str) -> list[str]:
    """What a plan has to say of a guest's connections that are to move; sentences for people. Never fails."""
    try:
        with _agent(site, guest) as agent:
            found, now = addressing.look(agent), addressing.sockets(agent)
    except HaulierError as error:
        return [f"clients keep the old address, by a tunnel, for the guest cannot be told of a new one: {error}"]
    told = found.problems() + found.remarks()
    plain = now.plain.get(address, 0)
    if plain:
        told.append(f"{plain} connections to {address} are plain TCP now: they keep it, by a tunnel, until they end")
    return told


# -- at the source ----------------------------------------------------------------------------------------------------


def plan_ahead(site: Site, guest: str, handoff: str, there: str) -> Stretch | None:
    """What to ask of the target so that clients join ahead. None where a tunnel leads to the guest already."""
    if clients.records(site).find(guest, "away") is not None:
        return None
    local, remote = clients.ends(there)
    return Stretch(vni=tunnel.vni_of(f"{handoff}/ahead"), home=remote, away=local, gateway_mac="", ahead=True)


class Joining:
    """At the source, beside a handoff: the guest is told of the address that it will have, and clients may join it."""

    def __init__(self, site: Site, journal: Journal, job: Job, control: Control, there: str, address: str) -> None:
        """`there`: an address of the target's host. Clients join now where the job says so and the target is able."""
        self._site, self._guest = site, job.guest
        ahead = plan_ahead(site, job.guest, job.handoff, there) if job.options.join == "ahead" else None
        if ahead is not None:
            control.send(ahead)
            answer = control.wait(Stretched, 30)
            ahead = msgspec.structs.replace(ahead, gateway_mac=answer.gateway_mac)
            if answer.error:
                log.warning("site %s makes no tunnel for clients to join ahead: %s", job.peer, answer.error)
                ahead = None

        def work() -> None:
            try:
                prepare(site, journal, job.guest, job.peer, address, ahead)
            except (HaulierError, OSError) as error:
                log.warning("guest %s is told of its new address after its move: %s", job.guest, error)

        # While its disk and memory are sent: the guest takes a moment.
        self._thread = threading.Thread(target=work, name="join", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the guest was told, or cannot be any more."""
        self._thread.join(AGENT_S)

    def call_off(self) -> None:
        """The guest stays."""
        self.wait()
        called_off(self._site, self._guest)


def prepare(site: Site, journal: Journal, guest: str, target: str, address: str, ahead: Stretch | None) -> None:
    """Has the guest take `address` the moment it runs at the target, before anybody there can tell it.

    With `ahead`, of which the target has made its end, clients join it now. HaulierError if the guest cannot be told.
    """
    row = journal.guest(guest)
    spec = spec_of(row)
    mac, number = tunnel.mac_of(BRIDGE), addressing.number_of(row.pending)
    if ahead is not None:
        clients.records(site).open(clients.end_of(site, guest, "away", target, spec.mac, [address], ahead))
    with _agent(site, guest) as agent:
        nic = addressing.nic_of(agent, spec.mac)
        take = addressing.take_lines(nic, address, _router(address, mac))
        if ahead is not None:
            addressing.batch(agent, [*take, *addressing.join_lines(nic, address, number, backup=True)])
        there = [*take, *addressing.join_lines(nic, address, number)]
        if spec.site_address:
            # It is an endpoint already where the guest came to it by a move.
            mine = addressing.numbers_of(row.epoch)
            there += addressing.spare_lines(nic, spec.site_address, _spare_number(row.pending), mine)
        addressing.arm(agent, nic, there)
    log.info("guest %s: clients join %s %s", guest, address, "ahead" if ahead is not None else "after its move")


def _spare_number(epoch: int) -> int:
    """The MPTCP id of the address that a guest leaves, for a moment: none that its stays have near this one."""
    return addressing.number_of(epoch + 125)


def _router(address: str, mac: str) -> str:
    """Where a guest's packets of this address leave by: IPv4's default route is there, IPv6's is the bridge."""
    return tunnel.link_local(mac) if ":" in address else ""


def called_off(site: Site, guest: str) -> None:
    """The handoff came to nothing: the guest gives up the address that it was to have. Never fails."""
    with contextlib.suppress(HaulierError), _agent(site, guest, 5.0) as agent:
        addressing.disarm(agent)
    found = clients.records(site).find(guest, "away")
    if found is not None and found.ahead:
        forget(site, guest, found.mac, found.address)
        clients.records(site).close(guest, "away")


def forget(site: Site, guest: str, mac: str, address: str) -> None:
    """The guest has `address` no more. Never fails: one that nobody uses does no harm."""
    try:
        with _agent(site, guest, 5.0) as agent:
            nic = addressing.nic_of(agent, mac)
            numbers = addressing.endpoints(addressing.batch(agent, ["mptcp endpoint show"])[0])
            gone = addressing.leave_lines(nic, address, numbers.get(address, ()))
            addressing.batch(agent, [*gone, *addressing.drop_lines(nic, address)])
    except HaulierError as error:
        log.info("guest %s keeps the address %s: %s", guest, address, error)


# -- at the target, and wherever a guest begins -----------------------------------------------------------------------


def receive_ahead(site: Site, guest: str, mac: str, source: str, news: Stretch) -> str:
    """Makes this site's end of a tunnel to a guest that is still at `source`; "" or why it cannot be made."""
    mine = clients.records(site)
    try:
        address = clients.leases(site).take(guest)
        mine.open(clients.end_of(site, guest, "home", source, mac, [address], news))
        mine.lead_away(guest)
    except (HaulierError, OSError) as error:
        mine.close(guest, "home")
        return str(error)
    return ""


def settle(site: Site, journal: Journal, guest: str, *, after_s: float = 0.0) -> dict[str, Any]:
    """Gives a guest that runs here its address of this site, and moves its clients' connections to it.

    It is asked nothing for `after_s` seconds. What came of it: "address", "moved_s" and how many connections were
    "left" at the old one. HaulierError if the guest could not be told; it may be repeated.
    """
    began = time.monotonic()
    row = journal.guest(guest)
    spec = spec_of(row)
    address = clients.leases(site).take(guest)
    old = _old_address(site, spec, address)
    announce.announce(spec.mac, address, BRIDGE)
    time.sleep(after_s)
    left = 0
    with _agent(site, guest) as agent:
        nic = addressing.nic_of(agent, spec.mac)
        lines = addressing.take_lines(nic, address, _router(address, tunnel.mac_of(BRIDGE)))
        if old:
            lines += addressing.join_lines(nic, address, addressing.number_of(row.epoch))
        said, failed, now = addressing.change(agent, [*lines, "mptcp endpoint show"])
        if failed:
            log.debug("guest %s: %s", guest, failed)
        if old:
            left = _leave(agent, nic, old, address, addressing.endpoints(said), row.epoch, now)
    spec = msgspec.structs.replace(spec, site_address=address)
    journal.advance(guest, State.OWNER.value, State.OWNER.value, spec=msgspec.to_builtins(spec))
    if left:
        log.info("guest %s: %d connections stay at %s, by a tunnel", guest, left, old)
    elif old:
        _end_tunnel(site, journal, guest, old)
    return {"address": address, "moved_s": round(time.monotonic() - began, 3), "left": left}


def settled(site: Site, spec: GuestSpec) -> bool:
    """A guest that runs here has its address of this site, and no tunnel for another one."""
    address = clients.leases(site).of(spec.name)
    return bool(address) and spec.site_address == address and not _old_address(site, spec, address)


def _old_address(site: Site, spec: GuestSpec, address: str) -> str:
    """The address of another site that the guest still has, for its connections; "" if there is none."""
    away = clients.records(site).find(spec.name, "away")
    old = away.address if away is not None and not away.ahead else spec.site_address
    return old if old != address else ""


def _leave(
    agent: GuestAgent,
    nic: str,
    old: str,
    address: str,
    numbers: dict[str, list[int]],
    epoch: int,
    now: addressing.Connections,
) -> int:
    """Waits until clients have joined `address`, then gives `old` up. How many connections could not leave it.

    `numbers`: of the guest's addresses, their ids as endpoints.
    """
    began = time.monotonic()
    again = began + AGAIN_S
    while (waiting := now.without(old, address)) and time.monotonic() < began + JOIN_S:
        time.sleep(POLL_S)
        if time.monotonic() > again and not now.tokens.get(address):
            again = began + JOIN_S
            addressing.batch(agent, addressing.again_lines(nic, address, numbers.get(address, ()), epoch))
        now = addressing.sockets(agent)
    plain = now.plain.get(old, 0)
    if waiting:
        # Closing their only subflow would end them; those that have joined shall use it only if they must.
        addressing.batch(agent, addressing.spare_lines(nic, old, _spare_number(epoch), numbers.get(old, ())))
        return waiting + plain
    gone = addressing.leave_lines(nic, old, numbers.get(old, ()))
    addressing.batch(agent, gone if plain else [*gone, *addressing.drop_lines(nic, old)])
    return plain


def _end_tunnel(site: Site, journal: Journal, guest: str, old: str) -> None:
    """Nothing goes by the old address any more."""
    mine = clients.records(site)
    away = mine.find(guest, "away")
    if away is None or away.address != old:
        return
    mine.close(guest, "away")
    with contextlib.suppress(HaulierError):
        Client.peer(site, journal.site(away.peer)).post("/v1/peer/routed", {"guest": guest, "over": True})


def end(site: Site, journal: Journal, guest: str) -> None:
    """Another policy from now on: the guest gives its address of this site up. Never fails."""
    spec = spec_of(journal.guest(guest))
    if spec.site_address:
        forget(site, guest, spec.mac, spec.site_address)
    clients.leases(site).drop(guest)
