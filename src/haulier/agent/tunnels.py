"""Looks after tunnels that keep guests' addresses, and tells what this host's network can do.

What a tunnel is for follows from the journal alone, so that whatever a crash left is put right: rebuilt while the guest
is elsewhere, taken away when it is here, or when nobody uses it any more.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any, Final

import msgspec

from haulier.agent.addresses import Addresses
from haulier.agent.core import Core
from haulier.agent.site import check_name
from haulier.errors import Conflict, HaulierError, NotTrusted, UsageError
from haulier.guests.model import GuestSpec, check_net
from haulier.handoff import clients, readdressing
from haulier.handoff.custody import record_of
from haulier.handoff.ownership import UNDER_WAY, State
from haulier.network import mptcp, paths, tunnel
from haulier.network.addresses import uplinks
from haulier.network.rules import AUTO, rule_for
from haulier.network.tunnel import Tunnel
from haulier.session.mptcp import available

log = logging.getLogger(__name__)

ROUTED_S: Final = 5.0
"""A tunnel whose guest can be reached without it goes after so long without a packet."""


class RoutedMessage(msgspec.Struct, forbid_unknown_fields=True):
    """The guest's address leads to the caller now; `over`: nothing uses the address any more that a tunnel kept."""

    guest: str
    over: bool = False


class NetRequest(msgspec.Struct, forbid_unknown_fields=True):
    net: str


class Tunnels:
    """One agent's. Blocking; any thread may call."""

    def __init__(self, core: Core, addresses: Addresses) -> None:
        self.core = core
        self.site = core.site
        self.records = clients.records(core.site)
        self.addresses = addresses
        self._seen: dict[tuple[str, str], tuple[int, float]] = {}

    # -- kept going

    def supervise(self) -> None:
        """Makes each tunnel what the journal says it should be."""
        for found in self.records.all():
            if self.core.is_busy(found.guest):
                continue
            try:
                self._look_after(found)
            except HaulierError as error:
                log.error("tunnel of guest %s to site %s: %s", found.guest, found.peer, error)

    def _look_after(self, found: Tunnel) -> None:
        row = self.core.journal.find_guest(found.guest)
        state = record_of(row).state
        if state in UNDER_WAY or self.core.journal.handoffs(guest=found.guest, live=True):
            return  # the workers' business
        if found.ahead:
            # Only a handoff needs it; its worker died.
            if found.role == "away" and state is State.OWNER:
                readdressing.called_off(self.site, found.guest)
            self.records.close(found.guest, found.role)
            return
        other = self.records.find(found.guest, "home" if found.role == "away" else "away")
        away = state is State.AWAY
        needed = away if found.role == "home" else state is State.OWNER or (away and other is not None)
        if not needed:
            log.info("guest %s needs its tunnel to site %s no more", found.guest, found.peer)
            if found.role == "home":
                self.records.come_home(found.guest)
            self.records.close(found.guest, found.role)
            return
        if not tunnel.there(found):
            log.info("making the tunnel of guest %s to site %s again", found.guest, found.peer)
            tunnel.up(found)
            if found.leads:
                tunnel.lead(found, True)
        elif found.role == "home" and not found.leads:
            self.records.lead_away(found.guest)
        if self._quiet(found) > (ROUTED_S if found.routed else self.site.tunnel_idle_s or float("inf")):
            log.info("nothing uses the tunnel of guest %s to site %s any more", found.guest, found.peer)
            self.records.close(found.guest, found.role)
            if found.role == "away" and state is State.OWNER and row is not None and row.spec.get("net") == "mptcp":
                readdressing.forget(self.site, found.guest, found.mac, found.address)

    def _quiet(self, found: Tunnel) -> float:
        """Seconds without a packet, as far as this agent has seen."""
        now, count = time.monotonic(), tunnel.packets(found)
        key = found.guest, found.interface
        before, since = self._seen.get(key, (-1, now))
        if count != before:
            since = now
        self._seen[key] = count, since
        return now - since

    # -- asked

    def routed(self, message: RoutedMessage, caller: str) -> dict[str, Any]:
        """Another site says that its hook has led a guest's address there. NotTrusted if the guest is not there."""
        name = check_name(message.guest, "guest")
        row = self.core.journal.find_guest(name)
        known = row is not None and (row.owner == caller or any(h.peer == caller for h in self._handoffs(name)))
        if not known:
            raise NotTrusted(f"site {caller!r} says where guest {name!r} is reached, which was never there")
        if message.over and record_of(row).state is State.AWAY:
            self.records.close(name, "home")
        else:
            self.records.routed(name)
        return {}

    def _handoffs(self, guest: str) -> list[Any]:
        # Its worker here may not have noted yet that the guest is gone.
        return self.core.journal.handoffs(guest=guest, live=True)

    def set_net(self, guest: str, request: NetRequest) -> dict[str, Any]:
        """Another policy for a guest of this site. Conflict while it is handed over or elsewhere."""
        net = check_net(request.net)
        with self.core.alone(guest, "being changed"):
            row = self.core.journal.guest(check_name(guest, "guest"))
            if record_of(row).state is not State.OWNER:
                raise Conflict(f"guest {guest!r} is {row.state} here: change it at the site that owns it")
            spec = msgspec.convert({**row.spec, "net": net}, GuestSpec)
            facts: dict[str, Any] = {}
            if net == "mptcp":
                self.addresses.leases.check()
            if net == "mptcp" and row.wanted == "running":
                facts = self.addresses.begin(guest)
                spec = msgspec.structs.replace(spec, site_address=facts["address"])
            elif row.spec.get("net") == "mptcp":
                readdressing.end(self.site, self.core.journal, guest)
                spec = msgspec.structs.replace(spec, site_address="")
            self.core.journal.advance(guest, State.OWNER.value, State.OWNER.value, spec=msgspec.to_builtins(spec))
        return {"guest": guest, "net": net} | facts

    def facts(self) -> dict[str, Any]:
        """Uplinks, what MPTCP needs towards each site, and tunnels."""
        found: dict[str, Any] = {"site": self.site.name, "tunnels": self.records.facts()}
        found |= self.addresses.facts()
        found["uplinks"] = []
        for uplink in uplinks():
            rule = rule_for(uplink, self.site.paths)
            entry = {"interface": uplink.interface, "address": uplink.address}
            found["uplinks"].append(entry | {"cap_mbps": rule.cap_bps / 1e6, "cost": rule.cost})
        found["mptcp"] = {"available": available(), "to": {}}
        found["tunnel_mtu"] = {}
        for row in self.core.journal.sites():
            if row.name == self.site.name:
                continue
            there = [address for address in row.bulk if address != AUTO]
            with contextlib.suppress(HaulierError):
                ways = paths.find(there, 0, self.site.paths)
                found["mptcp"]["to"][row.name] = _commands(ways)
            with contextlib.suppress(HaulierError):
                found["tunnel_mtu"][row.name] = [
                    {"address": each, "route": carried.route, "found": carried.found, "advice": said}
                    for each, carried, said in clients.carried(there)
                ]
        return found


def _commands(ways: list[paths.Way]) -> dict[str, Any]:
    if len(ways) < 2:
        return {"commands": [], "why_not": "there is one path only"}
    try:
        return {"commands": mptcp.script(paths.mptcp_steps(ways)).splitlines(), "why_not": ""}
    except UsageError as error:
        return {"commands": [], "why_not": str(error)}
