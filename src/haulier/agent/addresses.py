"""Looks after guests' addresses at this site: DHCP, addresses of the site's pool, and connections that move to them.

What should be follows from the journal alone, as with tunnels, so that whatever a crash left is put right.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

import msgspec

from haulier.agent.core import Core
from haulier.errors import HaulierError, NoRoom, Unsupported, UsageError
from haulier.guests import addressing
from haulier.guests.agent import GuestAgent
from haulier.guests.tap import BRIDGE
from haulier.handoff import clients, readdressing
from haulier.handoff.custody import record_of
from haulier.handoff.journal import GuestRow
from haulier.handoff.ownership import MAY_RUN, UNDER_WAY, State
from haulier.handoff.residence import guest_paths, spec_of
from haulier.network import tunnel
from haulier.network.dhcp import Dhcp, Host
from haulier.network.pool import Lease, Pool

log = logging.getLogger(__name__)

AGAIN_S: Final = 30.0
"""A guest whose connections are not all at its address of this site is looked at again after so long."""
AUTO: Final = "auto"


class Addresses:
    """One agent's. Blocking; any thread may call."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.site = core.site
        self.leases = clients.leases(core.site)
        self.dhcp = Dhcp(core.site.root / "dhcp", BRIDGE)
        self._again: dict[str, float] = {}
        self._led = False
        self._said = ""

    # -- kept going

    def supervise(self) -> None:
        """Makes leases, routes, DHCP and guests' addresses what the journal says."""
        rows = self.core.journal.guests()
        self._look_after_leases()
        self._serve(rows)
        for row in rows:
            if row.state == State.OWNER and row.wanted == "running" and row.spec.get("net") == "mptcp":
                self._look_after(row)

    def _look_after_leases(self) -> None:
        for lease in self.leases.all():
            row = self.core.journal.find_guest(lease.guest)
            wanted = row is not None and record_of(row).state in MAY_RUN | UNDER_WAY and row.spec.get("net") == "mptcp"
            if not wanted and not self.core.is_busy(lease.guest) and not self._leads(lease):
                self.leases.drop(lease.guest)
            elif not self._led:
                # Once: after a restart of the host its route is gone.
                self.leases.lead(lease.address)
        self._led = True

    def _leads(self, lease: Lease) -> bool:
        """A tunnel leads from the address to its guest, elsewhere."""
        found = clients.records(self.site).find(lease.guest, "home")
        return found is not None and found.address == lease.address

    def _serve(self, rows: list[GuestRow]) -> None:
        if not self.site.dhcp:
            if self.dhcp.directory.is_dir():
                self.dhcp.stop()
            return
        specs = [spec_of(row) for row in rows if record_of(row).state in MAY_RUN]
        hosts = [Host(s.name, s.mac, own) for s in specs for own in s.own_addresses if ":" not in own]
        try:
            self.dhcp.serve(hosts)
            self._said = ""
        except HaulierError as error:
            if str(error) != self._said:
                log.error("guests here get no addresses by DHCP: %s", error)
            self._said = str(error)

    def _look_after(self, row: GuestRow) -> None:
        if readdressing.settled(self.site, spec_of(row)) or self._again.get(row.name, 0.0) > time.monotonic():
            return
        if self.core.is_busy(row.name) or self.core.journal.handoffs(guest=row.name, live=True):
            return
        self._again[row.name] = time.monotonic() + AGAIN_S
        try:
            with self.core.alone(row.name, "being given its address of this site", brief=True):
                readdressing.settle(self.site, self.core.journal, row.name)
        except HaulierError as error:
            log.warning("guest %s has no address of this site yet: %s", row.name, error)

    # -- asked

    def choose(self, guest: str) -> str:
        """For `--address auto`: one that no guest has that began here, wherever it is now, with the bridge's length.

        UsageError without `guest_addresses` in site.toml, NoRoom when all are taken.
        """
        if not self.site.guest_addresses:
            raise UsageError(
                f"{AUTO!r} needs addresses that this site may give to guests: "
                'guest_addresses = "10.77.0.100-10.77.0.149" in site.toml, others at each site'
            )
        pool = Pool.parse(self.site.guest_addresses)
        length = tunnel.length_of(BRIDGE, str(pool.first))
        taken = {str(row.spec.get("address", "")).partition("/")[0] for row in self.core.journal.guests()}
        try:
            return f"{pool.choose(guest, taken)}/{length}"
        except NoRoom as error:
            raise NoRoom(f"{error} (guest_addresses in site.toml), or remove guests that are gone") from None

    def begin(self, guest: str) -> dict[str, Any]:
        """A guest that runs here has the policy mptcp from now on: gives it its address of this site.

        What it and its clients can do. Unsupported, or UsageError, if that is nothing.
        """
        if why := tunnel.missing():
            raise Unsupported(f"this host makes no VXLAN tunnel, which connections need while they move ({why})")
        self.leases.check()
        with GuestAgent(guest_paths(self.site, guest).qga_sock, name=guest) as agent:
            found = addressing.check(agent)
        facts = readdressing.settle(self.site, self.core.journal, guest)
        return facts | {"mptcp_ports": list(found.mptcp_ports), "remarks": found.remarks()}

    def facts(self) -> dict[str, Any]:
        """For people: leases, and whether DHCP is served."""
        dhcp = "off" if not self.site.dhcp else "on" if self.dhcp.running() else "not running"
        return {"addresses": msgspec.to_builtins(self.leases.all()), "dhcp": dhcp}
