"""What a path carries whole, probed through real routers of a lab, and what is said of a tunnel over it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from haulier.errors import HaulierError
from haulier.lab.lab import Lab
from haulier.network import mtu
from haulier.network.checksum import checksum
from haulier.network.mtu import Carries
from tests.support.labs import lab

ROOM, NARROW = 1600, 1400
TEXT = 'name = "mtu"\nipv6 = true\n' + "".join(f'[[site]]\nname = "{name}"\n' for name in ("a", "router", "b"))
TEXT += f'[[link]]\na = "a"\nb = "router"\nmtu = {ROOM}\n[[link]]\na = "router"\nb = "b"\nmtu = {NARROW}\n'


@pytest.mark.parametrize(
    ("address", "found", "said"),
    [
        ("192.0.2.1", Carries(1600, 1550), ""),
        ("192.0.2.1", Carries(9000, 0), ""),
        ("192.0.2.1", Carries(1500, 1500), "packets of 1450 bytes whole, as the path takes 1500"),
        ("192.0.2.1", Carries(1600, 1400), "raise the path's MTU to 1550, or set one of 1350 in the guest"),
        ("2001:db8::1", Carries(1550, 1550), "raise the path's MTU to 1570, or set one of 1480 in the guest"),
        ("192.0.2.1", Carries(0, 0), "not known whether the path to 192.0.2.1 carries packets of 1550 bytes"),
    ],
)
def test_it_is_said_what_full_packets_would_meet(address: str, found: Carries, said: str) -> None:
    told = mtu.advice(address, 1500, found)
    assert (said in told) if said else told == ""


def test_the_checksum_is_the_internets() -> None:
    # The example of RFC 1071, and a byte too few.
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == ~0xDDF2 & 0xFFFF
    assert checksum(b"\x01") == checksum(b"\x01\x00")


@pytest.fixture(scope="module")
def made() -> Iterator[Lab]:
    with lab(TEXT) as found:
        yield found


@pytest.mark.root
@pytest.mark.parametrize("six", [False, True], ids=["IPv4", "IPv6"])
def test_a_narrow_link_behind_a_router_is_found(made: Lab, six: bool) -> None:
    near = (made.address6 if six else made.address)("router", "a-router")
    far = (made.address6 if six else made.address)("b", "router-b")
    assert made.call("a", lambda: mtu.carries(near, 1550)) == Carries(ROOM, 1550)
    # Nobody has told this host of the narrow link yet, or a router just has: what is found is the same.
    for _ in range(2):
        found = made.call("a", lambda: mtu.carries(far, 1550))
        assert found.found == found.bytes == NARROW and found.route in (ROOM, NARROW)
    assert made.call("router", lambda: mtu.carries(far, 1550)).bytes == NARROW, "the interface itself"


@pytest.mark.root
def test_of_a_path_without_answers_the_route_is_known(made: Lab) -> None:
    made.link("router-b").set(up=False)
    try:
        found = made.call("a", lambda: mtu.carries(made.address("b", "router-b"), 1550, wait_s=0.1))
        assert found.found == 0 and found.bytes == found.route > 0
    finally:
        made.link("router-b").set(up=True)
    with pytest.raises(HaulierError):
        made.call("a", lambda: mtu.of_bridge("br0"))
