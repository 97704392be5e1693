"""A guest's address stays where it was routed: the old site's network is stretched to the new one, for one guest.

    client -> router -> HOME site's bridge -> VXLAN -> AWAY site's bridge -> guest          and back the same way

One VXLAN interface at each site is a port of the guests' bridge. Nothing is flooded into it, nothing is learnt from it:
only frames to the guest's MAC take it at home, and only what the guest sends beyond its own subnet takes it away.
Both bridges have the same address and MAC (a guest keeps its gateway), so what the guest sends to its gateway would end
at the new site: a rule leads it into the tunnel instead, with the home bridge's MAC as next hop. It goes back through
home because the address belongs there: routers filter, translate and count by it.

A site can be away for one tunnel of a guest and home for the next (a guest that moves on): then the path is a chain.

A packet that may not be cut and is too large with 50 bytes more is answered by the kernel with the MTU that fits (path
MTU discovery, also for bridged packets since Linux 5.9); any other goes over the underlay in fragments. VXLAN does not
encrypt; what it carries is what crossed the same networks before.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import ipaddress
import os
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from haulier.errors import UNDECODABLE, HaulierError, UsageError
from haulier.network import iproute
from haulier.network.pool import host_route

PORT: Final = 4789
MTU: Final = 1500
FIRST_TABLE: Final = 7500
TABLES: Final = 400
"""A guest's table and priority of its rule are taken from these by its name; a clash is looked for."""
NEXT_HOP: Final = "169.254.77.1"
NEXT_HOP6: Final = "fe80::77:1"
"""They stand for the home bridge in the away site's table; never asked for on any wire."""
_MAC = frozenset("0123456789abcdef:")


class Tunnel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One end of a tunnel, as its site remembers it. `local`, `remote`: addresses of the two hosts.

    `gateway_mac`: of the home site's bridge. `peer`: the site at the other end. `table`: of the away end.
    """

    guest: str
    role: Literal["home", "away"]
    peer: str
    owner: str
    """The site that keeps this record: tells two sites in one namespace apart."""
    vni: int
    local: str
    remote: str
    mac: str
    address: str
    also: str = ""
    """Of the other family, where the guest has an address of each."""
    gateway_mac: str = ""
    table: int = 0
    bridge: str
    leads: bool = False
    """At home: the guest is at the other end, frames to it go there."""
    routed: bool = False
    """A hook has led the address to the new site: the tunnel goes when it is quiet."""
    ahead: bool = False
    """The other way round: home is the site that the guest is on its way to, with an address of that site. It goes when
    the handoff ends, well or not."""

    def __post_init__(self) -> None:
        for text in (self.local, self.remote, *self.addresses):
            try:
                ipaddress.ip_address(text)
            except ValueError:
                raise UsageError(f"a tunnel needs IP addresses, not {text[:60]!r}") from None
        if self.also and (":" in self.also) == (":" in self.address):
            raise UsageError(f"a tunnel keeps one address of each family, not {self.address} and {self.also}")
        if not 0 < self.vni < 1 << 24 or not 0 <= self.table < 1 << 31:
            raise UsageError(f"a tunnel's numbers are out of bounds: {self.vni}, {self.table}")
        for mac in (self.mac, self.gateway_mac):
            if mac and (len(mac) != 17 or not set(mac) <= _MAC):
                raise UsageError(f"{mac[:40]!r} is no MAC address")

    @property
    def addresses(self) -> tuple[str, ...]:
        """What it keeps: one address, or one of each family."""
        return (self.address, self.also) if self.also else (self.address,)

    @property
    def interface(self) -> str:
        """At most 15 bytes, the same for the same guest and role."""
        digest = hashlib.blake2b(f"{self.owner}/{self.guest}/{self.role}".encode(), digest_size=5).hexdigest()
        return f"{'hx' if self.role == 'home' else 'hy'}-{digest}"


def vni_of(handoff: str) -> int:
    """The number of a tunnel on the wire: of the handoff it is made for, as a host has each number once. Never 0."""
    return int.from_bytes(hashlib.blake2b(handoff.encode(), digest_size=3).digest(), "big") or 1


def mac_of(bridge: str) -> str:
    """The MAC of the guests' bridge here. HaulierError without one."""
    return str(iproute.facts("link", "show", "dev", bridge)[0]["address"])


def length_of(bridge: str, address: str) -> int:
    """The prefix length of the subnet of `bridge` that has `address`. UsageError if none has."""
    wanted = ipaddress.ip_address(address)
    for link in iproute.facts("addr", "show", "dev", bridge):
        for entry in link.get("addr_info", ()):
            network = ipaddress.ip_interface(f"{entry['local']}/{entry['prefixlen']}").network
            if wanted in network:
                return network.prefixlen
    raise UsageError(
        f"the bridge {bridge} has no address in the subnet of {address}: it is guests' gateway, so add one"
    )


def link_local(mac: str) -> str:
    """The IPv6 address that an interface with `mac` gives itself on its link (RFC 4291, modified EUI-64). Pure."""
    own = bytes.fromhex(mac.replace(":", ""))
    return str(ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + bytes([own[0] ^ 2]) + own[1:3] + b"\xff\xfe" + own[3:]))


@functools.cache
def missing() -> str:
    """Why this host can make no tunnel; "" if it can, which was tried."""
    name = f"hz-{os.getpid()}"
    try:
        iproute.run(["ip", *f"link add {name} type vxlan id {(1 << 24) - 1} dstport {PORT} nolearning".split()])
        iproute.run(["ip", "link", "del", "dev", name])
    except HaulierError as error:
        return str(error)
    return ""


def up_lines(tunnel: Tunnel) -> list[str]:
    """What makes this end, but for the way of its IPv6 addresses, as lines for `ip -batch`. Pure."""
    name = tunnel.interface
    lines = [
        f"link add {name} type vxlan id {tunnel.vni} local {tunnel.local} remote {tunnel.remote} dstport {PORT} "
        "nolearning" + (" df unset" if ":" not in tunnel.local else ""),
        f"link set dev {name} mtu {MTU} addrgenmode none",
        f"link set dev {name} master {tunnel.bridge}",
        # neigh_suppress: the bridge answers who asks for the guest's MAC, and the question stays here.
        f"link set dev {name} type bridge_slave learning off flood off mcast_flood off bcast_flood off "
        "neigh_suppress on",
        f"link set dev {name} up",
    ]
    return [*lines, *(line for each in tunnel.addresses if ":" not in each for line in _way(tunnel, each))]


def up_lines6(tunnel: Tunnel) -> list[str]:
    """The rest, as lines for `ip -6 -batch`: a rule is one of IPv4 unless the whole batch is not. Pure."""
    return [line for address in tunnel.addresses if ":" in address for line in _way(tunnel, address)]


def _way(tunnel: Tunnel, address: str) -> list[str]:
    """The way back of what the guest sends from `address`, at the away end."""
    if tunnel.role == "home":
        return []
    hop, name = NEXT_HOP6 if ":" in address else NEXT_HOP, tunnel.interface
    return [
        f"neigh replace {hop} lladdr {tunnel.gateway_mac} dev {name} nud permanent",
        f"route replace default via {hop} dev {name} onlink table {tunnel.table}",
        f"rule add {_rule(tunnel, address)}",
        # For what the host itself has to say to the guest: that a packet is too large for the tunnel.
        f"route replace {_local(tunnel, address)}",
    ]


def _local(tunnel: Tunnel, address: str) -> str:
    # With a metric that leaves room for the operator's own route.
    return f"{host_route(address)} dev {tunnel.bridge} metric {FIRST_TABLE}"


def _rule(tunnel: Tunnel, address: str) -> str:
    return f"from {host_route(address)} iif {tunnel.bridge} table {tunnel.table} priority {tunnel.table}"


def down_lines(tunnel: Tunnel) -> list[str]:
    """What takes this end away, each line by itself: some of it may be gone. Pure."""
    lines = []
    for address in tunnel.addresses:
        if tunnel.role == "away":
            family = "-6 " if ":" in address else ""
            lines += [f"{family}rule del {_rule(tunnel, address)}", f"{family}route flush table {tunnel.table}"]
            lines += [f"{family}route del {_local(tunnel, address)}"]
        else:
            lines.append(f"neigh del {address} dev {tunnel.bridge}")
    return [*lines, f"link del dev {tunnel.interface}"]


def up(tunnel: Tunnel) -> None:
    """Makes this end; one that is left over is replaced. HaulierError if the host refuses: nothing stays."""
    down(tunnel)
    try:
        iproute.batch(up_lines(tunnel))
        iproute.batch(up_lines6(tunnel), "-6")
    except HaulierError:
        down(tunnel)
        raise


def down(tunnel: Tunnel) -> None:
    """Takes away what there is of this end; no error for what is gone."""
    for line in down_lines(tunnel):
        with contextlib.suppress(HaulierError):
            iproute.run(["ip", *line.split()])


def lead(tunnel: Tunnel, there: bool) -> None:
    """At home: frames to the guest go into the tunnel from now on, or do no more. HaulierError if the host refuses."""
    words = [tunnel.mac, "dev", tunnel.interface, "master"]
    if there:
        iproute.run(["bridge", "fdb", "replace", *words, "static"])
        # One process for both families: from here on each packet counts.
        neighbours = [
            f"{address} lladdr {tunnel.mac} dev {tunnel.bridge} nud permanent" for address in tunnel.addresses
        ]
        iproute.batch([f"neigh replace {neighbour}" for neighbour in neighbours])
        return
    forget = [["ip", "neigh", "del", address, "dev", tunnel.bridge] for address in tunnel.addresses]
    for undo in (["bridge", "fdb", "del", *words], *forget):
        with contextlib.suppress(HaulierError):
            iproute.run(undo)


def there(tunnel: Tunnel) -> bool:
    """This end's interface exists."""
    try:
        return bool(iproute.facts("link", "show", "dev", tunnel.interface))
    except HaulierError:
        return False


def packets(tunnel: Tunnel) -> int:
    """Packets that crossed this end, both ways; -1 if it is gone."""
    try:
        stats = iproute.facts("-s", "link", "show", "dev", tunnel.interface)[0]["stats64"]
    except (HaulierError, IndexError, KeyError):
        return -1
    return int(stats["rx"]["packets"]) + int(stats["tx"]["packets"])


def free_table(guest: str, taken: set[int]) -> int:
    """A table, and priority, for a guest's away end that none of `taken` is. Pure."""
    start = int.from_bytes(hashlib.blake2b(guest.encode(), digest_size=4).digest(), "big") % TABLES
    for number in range(TABLES):
        table = FIRST_TABLE + (start + number) % TABLES
        if table not in taken:
            return table
    raise UsageError(f"{TABLES} guests have tunnels here already: hand some of them back")


# -- what a site remembers of its tunnels ---------------------------------------------------------------------------


class Records:
    """The tunnels of one site, a file for each end, so that whoever comes next can take them away."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _path(self, guest: str, role: str) -> Path:
        return self.directory / f"{guest}.{role}.json"

    def save(self, tunnel: Tunnel) -> None:
        self.directory.mkdir(mode=0o700, exist_ok=True)
        path = self._path(tunnel.guest, tunnel.role)
        fresh = path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(tunnel))
        fresh.replace(path)

    def all(self) -> list[Tunnel]:
        """Those that can be read."""
        found = []
        for path in sorted(self.directory.glob("*.json")) if self.directory.is_dir() else ():
            with contextlib.suppress(OSError, *UNDECODABLE, UsageError):
                found.append(msgspec.json.decode(path.read_bytes(), type=Tunnel))
        return found

    def find(self, guest: str, role: str) -> Tunnel | None:
        return next((t for t in self.all() if t.guest == guest and t.role == role), None)

    def forget(self, tunnel: Tunnel) -> None:
        self._path(tunnel.guest, tunnel.role).unlink(missing_ok=True)

    # -- steps of a handoff; each may be repeated

    def open(self, tunnel: Tunnel) -> Tunnel:
        """Remembers this end, then makes it; an earlier one of the guest and role is taken away. HaulierError."""
        if tunnel.role == "away":
            taken = {t.table for t in self.all() if (t.guest, t.role) != (tunnel.guest, tunnel.role)}
            tunnel = msgspec.structs.replace(tunnel, table=free_table(tunnel.guest, taken))
        if (old := self.find(tunnel.guest, tunnel.role)) is not None:
            down(old)
        self.save(tunnel)
        try:
            up(tunnel)
        except HaulierError:
            self.forget(tunnel)
            raise
        return tunnel

    def close(self, guest: str, *roles: str) -> None:
        """Takes ends away; no error if there are none."""
        for role in roles or ("home", "away"):
            if (tunnel := self.find(guest, role)) is not None:
                down(tunnel)
                self.forget(tunnel)

    def lead_away(self, guest: str) -> None:
        """The guest has left: what comes for it goes to its new site."""
        tunnel = self.find(guest, "home")
        if tunnel is not None:
            self.save(msgspec.structs.replace(tunnel, leads=True))
            lead(tunnel, True)

    def come_home(self, guest: str) -> None:
        """The guest is here (again): nothing that comes for it leaves any more."""
        tunnel = self.find(guest, "home")
        if tunnel is not None and tunnel.leads:
            lead(tunnel, False)
            self.save(msgspec.structs.replace(tunnel, leads=False))

    def routed(self, guest: str) -> None:
        """A hook has led the address to where the guest is: its tunnels go as soon as they are quiet."""
        for tunnel in self.all():
            if tunnel.guest == guest:
                self.save(msgspec.structs.replace(tunnel, routed=True))

    def facts(self) -> list[dict[str, Any]]:
        """For people: every tunnel and what crossed it."""
        return [
            {"guest": t.guest, "role": t.role, "peer": t.peer, "address": t.address, "interface": t.interface}
            | {"also": t.also}
            | {"leads": t.leads, "routed": t.routed, "packets": packets(t)}
            for t in self.all()
        ]
