"""Which addresses count as ways out, from what `ip -j -d addr` tells."""

from __future__ import annotations

from typing import Any

from haulier.network.addresses import Uplink, own_addresses, uplinks_of


def interface(name: str, *addresses: dict[str, Any], kind: str = "", **more: Any) -> dict[str, Any]:
    found = {"ifname": name, "flags": ["BROADCAST", "UP", "LOWER_UP"], "addr_info": list(addresses), **more}
    return found | ({"linkinfo": {"info_kind": kind}} if kind else {})


def address(local: str, prefixlen: int, scope: str = "global", **more: Any) -> dict[str, Any]:
    return {"local": local, "prefixlen": prefixlen, "scope": scope, **more}


def test_uplinks_are_global_addresses_of_interfaces_that_lead_outside() -> None:
    tap = interface("hv-1", address("192.0.2.9", 24), kind="tun")
    tap["linkinfo"]["info_data"] = {"type": "tap"}
    found = uplinks_of(
        [
            interface("lo", address("10.90.0.1", 32), flags=["LOOPBACK", "UP"]),
            interface("eth0", address("192.0.2.10", 24), address("fe80::1", 64, "link"), address("2001:db8::1", 64)),
            interface("wwan0", address("100.64.3.7", 30), kind="tun"),
            interface("eth1", address("198.51.100.4", 24), flags=["BROADCAST"]),
            interface("eth2", address("198.51.100.5", 24), master="br0"),
            interface("br0", address("10.77.0.1", 24), kind="bridge"),
            interface("veth0", address("10.78.0.1", 24), kind="veth"),
            interface(
                "eth3", address("2001:db8:1::2", 64, temporary=True), address("2001:db8:1::3", 64, deprecated=True)
            ),
            tap,
            {},
        ]
    )
    assert found == [
        Uplink("eth0", "192.0.2.10", "192.0.2.0/24"),
        Uplink("eth0", "2001:db8::1", "2001:db8::/64"),
        Uplink("wwan0", "100.64.3.7", "100.64.3.4/30"),
    ]


def test_what_others_are_told_is_ipv4_first_and_each_address_once() -> None:
    one, two = Uplink("a", "2001:db8::1", "2001:db8::/64"), Uplink("a", "192.0.2.1", "192.0.2.0/24")
    assert own_addresses([one, two, one]) == ("192.0.2.1", "2001:db8::1")
    assert len(own_addresses([Uplink("a", f"192.0.2.{n}", "192.0.2.0/24") for n in range(40)])) == 16
