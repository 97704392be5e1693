"""DHCP of a site's guests: dnsmasq itself on a lab's bridge, asked by a client that is no code of ours."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.errors import Unsupported
from haulier.lab import namespaces
from haulier.lab.lab import Lab
from haulier.network.dhcp import Dhcp, Host, command, hosts_file
from tests.support.labs import lab
from tests.support.waiting import wait_for

MAC = "52:54:00:12:34:56"
MINE, OTHER = Host("web1", MAC, "10.77.0.10"), Host("web2", "52:54:00:12:34:57", "10.77.0.11")
SITES = 'name = "dhcp"\n' + "".join(
    f'[[site]]\nname = "{name}"\nguest_gateway = "10.77.0.1/24"\n' for name in ("oslo", "lisbon")
)
SITES += '[[link]]\na = "oslo"\nb = "lisbon"\n'
_serial = itertools.count()


def test_each_guest_has_a_line_and_nobody_else_is_answered(tmp_path: Path) -> None:
    assert hosts_file([OTHER, MINE]) == f"{MAC},10.77.0.10,web1,1h\n52:54:00:12:34:57,10.77.0.11,web2,1h\n"
    words = command("/usr/sbin/dnsmasq", tmp_path, "br0", [ipaddress.IPv4Interface("10.77.0.1/24")])
    assert "--dhcp-range=10.77.0.0,static,255.255.255.0,1h" in words and "--port=0" in words
    assert "--interface=br0" in words and "--except-interface=lo" in words and "--dhcp-authoritative" in words


def ask(kind: int, mac: str, number: int, wanted: str = "", server: str = "") -> bytes:
    """A DHCP message (RFC 2131): 1 DISCOVER, 3 REQUEST."""
    own = bytes.fromhex(mac.replace(":", ""))
    head = struct.pack("!BBBBIHH", 1, 1, 6, 0, number, 0, 0x8000) + bytes(16) + own.ljust(16, b"\0") + bytes(192)
    options = b"\x63\x82\x53\x63\x35\x01" + bytes([kind])
    if wanted:
        options += b"\x32\x04" + ipaddress.IPv4Address(wanted).packed
    if server:
        options += b"\x36\x04" + ipaddress.IPv4Address(server).packed
    return head + options + b"\xff"


def answer(data: bytes) -> tuple[str, dict[int, bytes]]:
    options, at = {}, 240
    while at < len(data) and data[at] != 255:
        if data[at] == 0:
            at += 1
            continue
        options[data[at]] = data[at + 2 : at + 2 + data[at + 1]]
        at += 2 + data[at + 1]
    return str(ipaddress.IPv4Address(data[16:20])), options


class Guest:
    """A namespace with a cable in a site's bridge."""

    def __init__(self, made: Lab, site: str, mac: str) -> None:
        self.name, self.mac = f"dhcpguest-{os.getpid()}-{next(_serial)}", mac
        namespaces.add(self.name)
        cable = f"c{next(_serial)}"
        namespaces.ip(self.name, [f"link add eth0 address {mac} type veth peer name {cable}", "link set eth0 up"])
        namespaces.ip(self.name, [f"link set {cable} netns {made.namespace(site)}"])
        namespaces.ip(made.namespace(site), [f"link set {cable} master br0 up"])

    def _talk(self, kind: int, number: int, wanted: str = "", server: str = "") -> tuple[str, dict[int, bytes]] | None:
        def talk() -> tuple[str, dict[int, bytes]] | None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
                sock.bind(("0.0.0.0", 68))
                sock.settimeout(1.0)
                sock.sendto(ask(kind, self.mac, number, wanted, server), ("255.255.255.255", 67))
                end = time.monotonic() + 1.0
                while time.monotonic() < end:
                    with contextlib.suppress(TimeoutError):
                        data = sock.recv(2048)
                        if data[:1] == b"\x02" and data[4:8] == struct.pack("!I", number):
                            return answer(data)
                return None

        return namespaces.call(self.name, talk)

    def begin(self) -> tuple[str, dict[int, bytes]] | None:
        """Discovers a server and takes what it offers, as a guest does that boots; None without an answer."""
        offer = self._talk(1, 0xABCD)
        if offer is None:
            return None
        return self._talk(3, 0xABCE, offer[0], str(ipaddress.IPv4Address(offer[1][54])))

    def renew(self, address: str) -> str:
        """As a guest does that has an address already: "" unless it is confirmed."""
        found = self._talk(3, 0xABCF, address)
        return found[0] if found is not None and found[1][53] == b"\x05" else ""


@pytest.fixture
def made() -> Iterator[Lab]:
    if shutil.which("dnsmasq", path="/usr/sbin:/usr/bin:/sbin") is None:
        pytest.skip("dnsmasq is not installed")
    with lab(SITES) as there:
        yield there


@pytest.mark.root
def test_a_lease_follows_the_guest_and_nobody_else_gets_one(made: Lab, tmp_path: Path) -> None:
    servers = {site: Dhcp(tmp_path / site, "br0") for site in ("oslo", "lisbon")}

    def serve(site: str, *hosts: Host) -> None:
        namespaces.call(made.namespace(site), lambda: servers[site].serve(hosts))

    guests: list[Guest] = []
    try:
        serve("oslo", MINE, OTHER)
        serve("lisbon")
        guests = [
            Guest(made, site, mac) for site, mac in (("oslo", MAC), ("lisbon", MAC), ("oslo", "52:54:00:00:00:01"))
        ]
        here, there, stranger = guests
        wait_for(here.begin, 20, "an answer")
        found = here.begin()
        assert found is not None and found[0] == MINE.address and found[1][53] == b"\x05"
        assert str(ipaddress.IPv4Address(found[1][3])) == "10.77.0.1", "its gateway"
        assert stranger.begin() is None, "who is no guest of this site"
        assert there.begin() is None, "the guest is not at lisbon yet"
        # It moves: lisbon confirms what it never gave, oslo gives it to nobody any more.
        serve("oslo", OTHER)
        serve("lisbon", MINE)
        wait_for(lambda: there.renew(MINE.address) == MINE.address, 20, "a lease that followed")
        wait_for(lambda: here.begin() is None, 20, "no lease where the guest has left")
        # The server outlives its agent, and is found again.
        process = servers["oslo"].running()
        assert process is not None
        namespaces.call(made.namespace("oslo"), lambda: Dhcp(tmp_path / "oslo", "br0").serve([OTHER]))
        assert servers["oslo"].running() == process
    finally:
        for server in servers.values():
            server.stop()
        for guest in guests:
            namespaces.delete(guest.name)
    assert all(server.running() is None for server in servers.values())


@pytest.mark.root
def test_a_bridge_without_an_address_is_said(made: Lab, tmp_path: Path) -> None:
    namespaces.ip(made.namespace("oslo"), ["addr flush dev br0"])
    with pytest.raises(Unsupported, match="no IPv4 address"):
        namespaces.call(made.namespace("oslo"), lambda: Dhcp(tmp_path / "d", "br0").serve([MINE]))
