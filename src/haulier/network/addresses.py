"""Which addresses this host has that other sites could reach, and by which interface a packet would leave."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from haulier.errors import HaulierError
from haulier.network import iproute

NOT_UPLINKS: Final = frozenset({"bridge", "tap", "veth", "vxlan", "dummy", "ifb", "wireguard-peer"})
"""Kinds of interfaces on which guests or tunnels hang, not the way out."""
MOST: Final = 16
"""A site tells others at most so many addresses."""


@dataclass(frozen=True)
class Uplink:
    """An address of an interface that leads outside; `network` is its subnet."""

    interface: str
    address: str
    network: str

    @property
    def version(self) -> int:
        return ipaddress.ip_address(self.address).version


def uplinks_of(found: Iterable[Mapping[str, Any]]) -> list[Uplink]:
    """The uplinks among what `ip -j -d addr` tells. Pure.

    An uplink is an address of global scope on an interface that is up, and neither loopback, bridge, tap, veth nor
    tunnel; not one that is about to go (deprecated), temporary, or not proved yet (tentative).
    """
    uplinks = []
    for interface in found:
        name, flags = str(interface.get("ifname", "")), interface.get("flags", ())
        info = interface.get("linkinfo") or {}
        kind = str(info.get("info_kind", ""))
        if kind == "tun" and (info.get("info_data") or {}).get("type") == "tap":
            kind = "tap"
        if not name or "UP" not in flags or "LOOPBACK" in flags or kind in NOT_UPLINKS or interface.get("master"):
            continue
        for entry in interface.get("addr_info", ()):
            if entry.get("scope") != "global" or entry.get("deprecated") or entry.get("tentative"):
                continue
            if entry.get("temporary") or not entry.get("local"):
                continue
            whole = ipaddress.ip_interface(f"{entry['local']}/{entry.get('prefixlen', 128)}")
            uplinks.append(Uplink(name, str(whole.ip), str(whole.network)))
    return uplinks


def uplinks() -> list[Uplink]:
    """Uplinks of the namespace of the caller. HaulierError if iproute2 does not tell."""
    return uplinks_of(iproute.facts("-d", "addr", "show"))


def own_addresses(found: Sequence[Uplink]) -> tuple[str, ...]:
    """What a site tells others of where it can be reached: IPv4 first, each once."""
    ordered = sorted(found, key=lambda uplink: uplink.version)
    return tuple(dict.fromkeys(uplink.address for uplink in ordered))[:MOST]


def leaving_by(address: str) -> str:
    """The interface by which packets to `address` leave as routes are; "" if there is no way."""
    try:
        found = iproute.facts("route", "get", address)
    except HaulierError:
        return ""
    return str(found[0].get("dev", "")) if found else ""
