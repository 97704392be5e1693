"""The frame that tells neighbours where a guest is."""

from __future__ import annotations

import socket

import pytest

from haulier.network.announce import announce, gratuitous_arp, neighbour_advertisement
from tests.support.labs import lab
from tests.support.waiting import wait_for


def test_the_frame_asks_for_the_guests_own_address() -> None:
    frame = gratuitous_arp("52:54:00:12:34:56", "10.77.0.10")
    assert len(frame) == 60
    assert frame[:14] == b"\xff" * 6 + bytes.fromhex("525400123456") + b"\x08\x06"
    assert frame[14:22] == bytes.fromhex("0001080006040001")
    assert frame[22:28] == bytes.fromhex("525400123456") and frame[28:32] == frame[38:42] == bytes([10, 77, 0, 10])


@pytest.mark.root
def test_a_neighbour_learns_it_from_the_bridge() -> None:
    text = 'name = "arp"\n[[site]]\nname = "a"\nguest_gateway = "10.77.0.1/24"\n'
    with lab(text) as made:
        made.exec("a", ["ip", "link", "add", "port", "type", "veth", "peer", "name", "near"])
        for line in ("link set port master br0 up", "link set near up"):
            made.exec("a", ["ip", *line.split()])
        heard = made.call("a", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806)))
        with heard:
            heard.bind(("near", 0x0806))
            heard.settimeout(10)
            assert made.call("a", lambda: announce("52:54:00:12:34:56", "10.77.0.10", "br0"))
            assert heard.recv(100)[:42] == gratuitous_arp("52:54:00:12:34:56", "10.77.0.10")[:42]
        assert not made.call("a", lambda: announce("52:54:00:12:34:56", "10.77.0.10", "nosuch"))


def test_the_advertisement_names_address_and_mac() -> None:
    frame = neighbour_advertisement("52:54:00:12:34:56", "fd78::10")
    assert frame[:14] == bytes.fromhex("333300000001525400123456") + b"\x86\xdd"
    assert frame[54:56] == b"\x88\x00" and frame[-6:] == bytes.fromhex("525400123456")
    assert frame[62:78] == frame[22:38] == socket.inet_pton(socket.AF_INET6, "fd78::10")


@pytest.mark.root
def test_a_neighbours_kernel_believes_the_advertisement() -> None:
    """It has another MAC in mind for the address; the kernel checks lengths, hop limit and checksum."""
    text = 'name = "nd"\nipv6 = true\n[[site]]\nname = "a"\nguest_gateway = "10.77.0.1/24"\n'
    with lab(text) as made:
        made.exec("a", ["ip", "link", "add", "port", "type", "veth", "peer", "name", "near"])
        for line in ("link set port master br0 up", "link set near up", "addr add fd78::1/64 dev near nodad"):
            made.exec("a", ["ip", *line.split()])
        made.exec(
            "a", ["ip", "neigh", "replace", "fd78::10", "lladdr", "52:54:00:00:00:99", "dev", "near", "nud", "stale"]
        )

        def believed() -> bool:
            assert made.call("a", lambda: announce("52:54:00:12:34:56", "fd78::10", "br0"))
            return "52:54:00:12:34:56" in made.exec("a", ["ip", "neigh", "show", "fd78::10"]).stdout

        wait_for(believed, 10, "the neighbour to believe it")
