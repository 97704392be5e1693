"""A lab's description: TOML in, checked dataclasses out, and the routes that follow from it. No I/O.

    name = "demo"
    ipv6 = true                         # IPv6 beside IPv4, at every site and on every link; left out: IPv4 alone
    [[site]]
    name = "oslo"
    guest_gateway = "10.77.0.1/24"      # gives the site a bridge br0 for guests
    guest_gateway6 = "fd77::1/64"       # its IPv6 address, in a lab with IPv6
    [[site]]
    name = "client"
    [[link]]
    a = "oslo"
    b = "client"
    rate = "10mbit"                     # kbit, mbit, gbit; 0 or left out: not limited
    delay = "25ms"                      # one way; us, ms, s
    jitter = "2ms"
    loss = "0.5%"
    queue = "64kB"                      # left out: one bandwidth-delay product, at least 48 kB
    b_to_a = { rate = "2mbit" }         # one direction differs

Several links between the same two sites are several paths.
"""

from __future__ import annotations

import heapq
import itertools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path
from typing import Any, Final

from haulier.errors import UsageError
from haulier.lab.shaper import Shape

SITE_ADDRESSES: Final = IPv4Network("10.90.0.0/24")
"""Each site's own address, the same whatever link a packet takes."""
LINK_ADDRESSES: Final = IPv4Network("10.91.0.0/16")
"""Cut into a /30 for each link that names no subnet."""
SITE_ADDRESSES6: Final = IPv6Network("fd90::/64")
"""The same for IPv6: `::1` for the first site, and so on."""
LINK_ADDRESSES6: Final = IPv6Network("fd91::/48")
"""Cut into a /126 for each link of a lab with IPv6."""
GATEWAY_MAC: Final = "02:68:61:75:6c:01"
"""The same at every site: a guest's ARP cache stays right after a move."""
BRIDGE: Final = "br0"
MAX_SITES: Final = 200
MAX_LINKS: Final = 1000
MAX_TEXT: Final = 1 << 20

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
_NUMBER = r"\s*([0-9]+(?:\.[0-9]+)?)\s*"
_RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_SIZES = {"b": 1, "kb": 1000, "mb": 1000**2, "kib": 1024, "mib": 1024**2}
_SHAPE_KEYS = ("rate", "delay", "jitter", "loss", "queue", "up")


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """One site. `address`: its own; `guest_gateway`: address of its guest bridge, None = no bridge.

    `address6`: its own IPv6 address, None in a lab without IPv6; `guest_gateway6`: the bridge's.
    """

    name: str
    address: IPv4Address
    guest_gateway: IPv4Interface | None
    address6: IPv6Address | None = None
    guest_gateway6: IPv6Interface | None = None


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """One link between the sites `a` and `b`; `interface` has the same name at both ends."""

    name: str
    a: str
    b: str
    subnet: IPv4Network
    interface: str
    mtu: int
    a_to_b: Shape
    b_to_a: Shape
    subnet6: IPv6Network | None = None

    @property
    def address_a(self) -> IPv4Interface:
        """Address of the link at site `a`, with the subnet's length."""
        return IPv4Interface((self.subnet[1], self.subnet.prefixlen))

    @property
    def address_b(self) -> IPv4Interface:
        """Address of the link at site `b`, with the subnet's length."""
        return IPv4Interface((self.subnet[2], self.subnet.prefixlen))

    def address(self, site: str) -> IPv4Interface:
        """The link's address at `site`, which must be one of its ends."""
        if site not in (self.a, self.b):
            raise UsageError(f"link {self.name} joins {self.a} and {self.b}, not {site}")
        return self.address_a if site == self.a else self.address_b

    def address6(self, site: str) -> IPv6Interface | None:
        """The link's IPv6 address at `site`, one of its ends; None in a lab without IPv6."""
        number = 1 if self.address(site) == self.address_a else 2
        return IPv6Interface((self.subnet6[number], self.subnet6.prefixlen)) if self.subnet6 else None

    def other(self, site: str) -> str:
        """The site at the other end."""
        return self.b if site == self.a else self.a


@dataclass(frozen=True, slots=True)
class Route:
    """An entry of a site's routing table: `to` through `via` on `interface`, from `source` (None: the interface's)."""

    to: IPv4Network | IPv6Network
    via: IPv4Address | IPv6Address
    interface: str
    source: IPv4Address | IPv6Address | None


@dataclass(frozen=True, slots=True)
class Topology:
    """A checked description of a lab."""

    name: str
    sites: tuple[SiteSpec, ...]
    links: tuple[LinkSpec, ...]
    ipv6: bool = False

    def site(self, name: str) -> SiteSpec:
        """The site of that name; `UsageError` with the names there are."""
        for site in self.sites:
            if site.name == name:
                return site
        raise UsageError(f"lab {self.name} has no site {name!r}: it has {', '.join(s.name for s in self.sites)}")

    def link(self, name: str) -> LinkSpec:
        """The link of that name; `UsageError` with the names there are."""
        for link in self.links:
            if link.name == name:
                return link
        there = ", ".join(link.name for link in self.links) or "none"
        raise UsageError(f"lab {self.name} has no link {name!r}: it has {there}")

    def links_of(self, site: str) -> list[LinkSpec]:
        """Links with an end at `site`, in order of the description."""
        return [link for link in self.links if site in (link.a, link.b)]

    def path(self, start: str, end: str) -> list[LinkSpec]:
        """The links of the quickest way (by delay, then number of links, then order); `UsageError` if there is none."""
        self.site(start)
        self.site(end)
        way = self._ways(start).get(end)
        if way is None:
            raise UsageError(f"lab {self.name} has no way from {start} to {end}: add a link")
        return way

    def routes(self, site: str) -> list[Route]:
        """What `site` needs beyond its own subnets: every address of every other site, and the guests' subnets.

        A guests' subnet that `site` has not got itself leads to the nearest site that has it.
        """
        ways = self._ways(site)
        here = self.site(site)
        found: list[Route] = []
        nearest: dict[IPv4Network, Route] = {}
        for name, way in ways.items():
            if not way:
                continue
            first = way[0]
            via = first.address(first.other(site)).ip
            target = self.site(name)
            found.append(Route(IPv4Network(target.address), via, first.interface, here.address))
            for link in self.links_of(name):
                if site not in (link.a, link.b):
                    address = link.address(name).ip
                    found.append(Route(IPv4Network(address), via, first.interface, None))
            gateway = target.guest_gateway
            if gateway is not None and (here.guest_gateway is None or here.guest_gateway.network != gateway.network):
                # `ways` is in order of distance, so the first one is the nearest.
                nearest.setdefault(gateway.network, Route(gateway.network, via, first.interface, here.address))
            found += self._routes6(site, target, first)
        return found + list(nearest.values())

    def _routes6(self, site: str, target: SiteSpec, first: LinkSpec) -> list[Route]:
        """What `site` needs to reach the IPv6 addresses of `target`, the first link on the way being `first`."""
        hop = first.address6(first.other(site))
        if hop is None or target.address6 is None:
            return []
        found = [Route(IPv6Network(target.address6), hop.ip, first.interface, self.site(site).address6)]
        for link in self.links_of(target.name):
            if site not in (link.a, link.b) and (there := link.address6(target.name)) is not None:
                found.append(Route(IPv6Network(there.ip), hop.ip, first.interface, None))
        return found

    def _ways(self, start: str) -> dict[str, list[LinkSpec]]:
        """Site -> links of the quickest way from `start`, nearest first (Dijkstra)."""
        done: dict[str, list[LinkSpec]] = {}
        todo: list[tuple[float, int, int, str, list[LinkSpec]]] = [(0.0, 0, 0, start, [])]
        serial = 0
        while todo:
            cost, hops, _, name, way = heapq.heappop(todo)
            if name in done:
                continue
            done[name] = way
            for link in self.links_of(name):
                other = link.other(name)
                if other not in done:
                    delay = (link.a_to_b.delay_s + link.b_to_a.delay_s) / 2
                    serial += 1
                    heapq.heappush(todo, (cost + delay, hops + 1, serial, other, [*way, link]))
        return done


def load(source: str | Path) -> Topology:
    """Reads a topology: a `Path` is a file, a `str` is the TOML text itself. `UsageError` says which entry is off."""
    if isinstance(source, Path):
        try:
            with source.open("rb") as file:
                raw = file.read(MAX_TEXT + 1)
            text = raw.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read topology {source}: {error}") from None
        where = str(source)
    else:
        text, where = source, "topology"
    if len(text) > MAX_TEXT:
        raise UsageError(f"{where} is larger than {MAX_TEXT} bytes: that is no topology")
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{where} is not TOML: {error}") from None
    return parse(table)


def parse(table: Mapping[str, Any]) -> Topology:
    """Checks a topology that was read from TOML."""
    _only(table, {"name", "ipv6", "site", "link"}, "the topology")
    name = check_name(table.get("name"), "the lab")
    ipv6 = table.get("ipv6", False)
    if not isinstance(ipv6, bool):
        raise UsageError(f"ipv6 = {ipv6!r}: give true or false")
    sites = _sites(_tables(table.get("site", []), "site"), ipv6)
    links = _links(_tables(table.get("link", []), "link"), [site.name for site in sites])
    _check_networks(sites, links)
    if ipv6:
        sites = tuple(replace(s, address6=SITE_ADDRESSES6[n]) for n, s in enumerate(sites, 1))
        links = tuple(
            replace(link, subnet6=IPv6Network((LINK_ADDRESSES6[n << 64], 126))) for n, link in enumerate(links)
        )
    return Topology(name, sites, links, ipv6)


def parse_rate(value: object, where: str = "rate") -> float:
    """ "10mbit" -> 10e6 bit/s; a number is bit/s; 0 = not limited."""
    return _quantity(value, _RATES, "bit", where, 'a rate like "10mbit"')


def parse_time(value: object, where: str = "delay") -> float:
    """ "25ms" -> 0.025 s; a number is seconds."""
    return _quantity(value, _TIMES, "s", where, 'a time like "25ms"')


def parse_size(value: object, where: str = "queue") -> int:
    """ "64kB" -> 64000 bytes, "64KiB" -> 65536; a number is bytes."""
    return int(_quantity(value, _SIZES, "b", where, 'a size like "64kB"'))


def parse_loss(value: object, where: str = "loss") -> float:
    """ "1%" -> 0.01; a number is a share from 0 to 1."""
    return _quantity(value, {"%": 0.01, "": 1.0}, "", where, 'a share like "1%" or 0.01')


def parse_shape(table: Mapping[str, object], where: str, base: Shape | None = None) -> Shape:
    """rate, delay, jitter, loss, queue and up of `table` on top of `base`."""
    changes: dict[str, Any] = {}
    if "rate" in table:
        changes["rate_bps"] = parse_rate(table["rate"], f"{where}: rate")
    if "delay" in table:
        changes["delay_s"] = parse_time(table["delay"], f"{where}: delay")
    if "jitter" in table:
        changes["jitter_s"] = parse_time(table["jitter"], f"{where}: jitter")
    if "loss" in table:
        changes["loss"] = parse_loss(table["loss"], f"{where}: loss")
    if "queue" in table:
        changes["queue_bytes"] = parse_size(table["queue"], f"{where}: queue")
    if "up" in table:
        if not isinstance(table["up"], bool):
            raise UsageError(f"{where}: up = {table['up']!r}: give true or false")
        changes["up"] = table["up"]
    try:
        return (base or Shape()).changed(**changes)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _quantity(value: object, units: Mapping[str, float], plain: str, where: str, wanted: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) * units[plain]
    if isinstance(value, str) and len(value) < 40:
        match = re.fullmatch(_NUMBER + r"([a-z%]*)", value.strip().lower())
        if match and (match[2] or plain) in units:
            # Rounded, so that "100us" is 0.0001 and not a hair less.
            return round(float(match[1]) * units[match[2] or plain], 12)
    raise UsageError(f"{where} = {value!r}: give {wanted}")


def _only(table: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _tables(value: object, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise UsageError(f"write every {what} as [[{what}]]")
    return value


def check_name(value: object, where: str) -> str:
    """A lab's, site's or link's name, or `UsageError`."""
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise UsageError(f"{where}: name = {value!r}: give lower-case letters, digits and inner dashes, 32 at most")


def _sites(tables: list[dict[str, Any]], ipv6: bool) -> tuple[SiteSpec, ...]:
    if not 1 <= len(tables) <= MAX_SITES:
        raise UsageError(f"a lab has 1 to {MAX_SITES} sites, this one {len(tables)}")
    sites: list[SiteSpec] = []
    for number, table in enumerate(tables, 1):
        name = check_name(table.get("name"), f"site {number}")
        where = f"site {name}"
        _only(table, {"name", "guest_gateway", "guest_gateway6", "address"}, where)
        if any(site.name == name for site in sites):
            raise UsageError(f"{where} is described twice")
        gateway: IPv4Interface | None = None
        gateway6: IPv6Interface | None = None
        address = SITE_ADDRESSES[number]
        try:
            if "guest_gateway" in table:
                gateway = IPv4Interface(_text(table["guest_gateway"]))
            if "guest_gateway6" in table:
                gateway6 = IPv6Interface(_text(table["guest_gateway6"]))
            if "address" in table:
                address = IPv4Address(_text(table["address"]))
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from None
        if gateway is not None and not 8 <= gateway.network.prefixlen <= 30:
            raise UsageError(
                f"{where}: guest_gateway {gateway}: write the length of the guests' subnet, like 10.77.0.1/24"
            )
        if gateway6 is not None and (gateway is None or not 16 <= gateway6.network.prefixlen <= 124):
            raise UsageError(
                f"{where}: guest_gateway6 {gateway6}: write the length of the guests' subnet, like fd77::1/64, and a "
                "guest_gateway beside it"
            )
        if gateway6 is not None and not ipv6:
            raise UsageError(f"{where}: guest_gateway6 needs ipv6 = true at the top of the topology")
        sites.append(SiteSpec(name, address, gateway, None, gateway6))
    return tuple(sites)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no address: write it in quotes")
    return value


def _links(tables: list[dict[str, Any]], sites: list[str]) -> tuple[LinkSpec, ...]:
    if len(tables) > MAX_LINKS:
        raise UsageError(f"a lab has at most {MAX_LINKS} links, this one {len(tables)}")
    links: list[LinkSpec] = []
    for index, table in enumerate(tables):
        a, b = table.get("a"), table.get("b")
        for end, site in (("a", a), ("b", b)):
            if not isinstance(site, str) or site not in sites:
                raise UsageError(
                    f"link {index + 1}: {end} = {site!r} is no site of this lab: it has {', '.join(sites)}"
                )
        assert isinstance(a, str) and isinstance(b, str)
        if a == b:
            raise UsageError(f"link {index + 1} leads from {a} to itself")
        taken = {link.name for link in links}
        if "name" in table:
            name = check_name(table["name"], f"link {index + 1}")
            if name in taken:
                raise UsageError(f"link {name} is described twice")
        else:
            same = sum({link.a, link.b} == {a, b} for link in links)
            name = f"{a}-{b}" + (f"-{same + 1}" if same else "")
            if name in taken:
                raise UsageError(f"link {index + 1} would be called {name}, which is taken: give it a name")
        where = f"link {name}"
        _only(table, {"name", "a", "b", "subnet", "mtu", "a_to_b", "b_to_a", *_SHAPE_KEYS}, where)
        both = parse_shape(table, where)
        ways: list[Shape] = []
        for way in ("a_to_b", "b_to_a"):
            own = table.get(way, {})
            if not isinstance(own, dict):
                raise UsageError(f'{where}: {way} is a table, like {way} = {{ rate = "2mbit" }}')
            _only(own, set(_SHAPE_KEYS), f"{where}: {way}")
            ways.append(parse_shape(own, f"{where}: {way}", both))
        mtu = table.get("mtu", 1500)
        if not isinstance(mtu, int) or isinstance(mtu, bool) or not 576 <= mtu <= 9000:
            raise UsageError(f"{where}: mtu = {mtu!r}: give 576 to 9000")
        start = int(LINK_ADDRESSES.network_address) + 4 * index
        subnet = IPv4Network((start, 30))
        if "subnet" in table:
            try:
                subnet = IPv4Network(_text(table["subnet"]))
            except ValueError as error:
                raise UsageError(f"{where}: subnet: {error}") from None
            if not 8 <= subnet.prefixlen <= 30:
                raise UsageError(f"{where}: subnet {subnet} has no room for two addresses: give a /30 or larger")
        links.append(LinkSpec(name, a, b, subnet, f"wan{index}", mtu, ways[0], ways[1]))
    return tuple(links)


def _check_networks(sites: tuple[SiteSpec, ...], links: tuple[LinkSpec, ...]) -> None:
    """No two things may have the same addresses, but guest subnets, which move with the guests."""
    seen: list[tuple[str, IPv4Network]] = []
    gateways: dict[IPv4Network, SiteSpec] = {}
    for site in sites:
        seen.append((f"the address of site {site.name}", IPv4Network(site.address)))
        if site.guest_gateway is None:
            continue
        network = site.guest_gateway.network
        first = gateways.setdefault(network, site)
        if first.guest_gateway != site.guest_gateway:
            raise UsageError(
                f"sites {first.name} and {site.name} have the guests' subnet {network} in common but not the "
                "gateway: guests keep their gateway when they move, so give both the same address"
            )
        if first is site:
            seen.append((f"the guests' subnet of site {site.name}", network))
    seen.extend((f"the subnet of link {link.name}", link.subnet) for link in links)
    ordered = sorted(seen, key=lambda entry: (int(entry[1].network_address), entry[1].prefixlen))
    for (what, network), (other, following) in itertools.pairwise(ordered):
        if network.overlaps(following):
            raise UsageError(f"{what} ({network}) and {other} ({following}) overlap: change one of them")
