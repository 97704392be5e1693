"""Tunnels that keep an address: what is set up on paper, and packets of a client to a guest that moves, both real."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from haulier.errors import HaulierError, UsageError
from haulier.lab import namespaces
from haulier.lab.lab import Lab
from haulier.network.tunnel import (
    FIRST_TABLE,
    TABLES,
    Records,
    Tunnel,
    down_lines,
    free_table,
    link_local,
    mac_of,
    packets,
    up_lines,
    up_lines6,
    vni_of,
)
from tests.support.labs import lab
from tests.support.waiting import wait_for

MAC, ADDRESS = "52:54:00:12:34:56", "10.77.0.10"
GATEWAY_MAC = "02:68:61:75:6c:01"


def end(role: str, *, owner: str = "s", local: str = "192.0.2.1", remote: str = "203.0.113.1", vni: int = 77) -> Tunnel:
    return Tunnel(
        guest="web1",
        role=role,  # type: ignore[arg-type]
        peer="lisbon",
        owner=owner,
        vni=vni,
        local=local,
        remote=remote,
        mac=MAC,
        address=ADDRESS,
        gateway_mac=GATEWAY_MAC if role == "away" else "",
        table=7501 if role == "away" else 0,
        bridge="br0",
    )


def test_an_end_floods_nothing_and_learns_nothing() -> None:
    home, away = end("home"), end("away")
    assert home.interface != away.interface and len(home.interface) == len(away.interface) == 13
    assert home.interface == end("home").interface != end("home", owner="t").interface
    text = "\n".join(up_lines(home))
    assert "learning off flood off mcast_flood off bcast_flood off neigh_suppress on" in text
    assert "id 77 local 192.0.2.1 remote 203.0.113.1 dstport 4789 nolearning df unset" in text
    assert "df" not in up_lines(end("home", local="2001:db8::1", remote="2001:db8::2"))[0], "IPv6 has no such bit"
    assert "rule" not in text, "only the guest's own site sends its packets back"
    assert f"rule add from {ADDRESS}/32 iif br0 table 7501 priority 7501" in up_lines(away)
    assert f"route replace {ADDRESS}/32 dev br0 metric 7500" in up_lines(away), "where ICMP finds the guest"
    assert down_lines(away)[-1] == f"link del dev {away.interface}"


def test_a_guest_with_an_address_of_each_family_has_two_ways_back_in_one_tunnel() -> None:
    both = msgspec.structs.replace(end("away"), also="fd77::10")
    assert up_lines(both) == up_lines(end("away")), "IPv6 is a batch of its own"
    assert "rule add from fd77::10/128 iif br0 table 7501 priority 7501" in up_lines6(both)
    assert up_lines6(end("away")) == up_lines6(msgspec.structs.replace(end("home"), also="fd77::10")) == []
    down = down_lines(both)
    assert "-6 route flush table 7501" in down and "route flush table 7501" in down
    assert len([line for line in down if line.startswith("link del")]) == 1
    with pytest.raises(UsageError, match="one address of each family"):
        msgspec.structs.replace(both, also="10.77.0.11")


@pytest.mark.parametrize("wrong", [{"local": "lisbon"}, {"vni": 0}, {"vni": 1 << 24}])
def test_ends_that_make_no_sense_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        end("home", **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="MAC"):
        Tunnel(**{**{n: getattr(end("home"), n) for n in Tunnel.__struct_fields__}, "mac": "; reboot"})


def test_each_guest_gets_a_table_of_its_own() -> None:
    taken: set[int] = set()
    for number in range(TABLES):
        taken.add(free_table(f"web{number}", taken))
    assert taken == set(range(FIRST_TABLE, FIRST_TABLE + TABLES))
    with pytest.raises(UsageError, match="400 guests"):
        free_table("one-more", taken)
    assert 0 < vni_of("a") < 1 << 24 and vni_of("a") != vni_of("b")


def test_records_outlive_the_process_and_nonsense_among_them(tmp_path: Path) -> None:
    records = Records(tmp_path / "tunnels")
    assert records.all() == [] and records.find("web1", "home") is None
    records.save(end("home"))
    (tmp_path / "tunnels" / "other.home.json").write_text('{"guest": "other"}')
    assert Records(tmp_path / "tunnels").all() == [end("home")]
    records.forget(end("home"))
    assert records.all() == []


SITES = 'name = "tun"\n' + "".join(
    f'[[site]]\nname = "{name}"\nguest_gateway = "10.77.0.1/24"\n' for name in ("oslo", "lisbon", "quito")
)
SITES += '[[site]]\nname = "client"\n[[link]]\na = "client"\nb = "oslo"\ndelay = "1ms"\n'
SITES += '[[link]]\na = "oslo"\nb = "lisbon"\ndelay = "2ms"\n[[link]]\na = "lisbon"\nb = "quito"\ndelay = "2ms"\n'
_serial = itertools.count()


class Moving:
    """A guest (a namespace with a cable) and the tunnels of three sites."""

    def __init__(self, made: Lab, root: Path) -> None:
        self.lab = made
        self.name = f"tunguest-{os.getpid()}-{next(_serial)}"
        self.site = ""
        self.records = {site: Records(root / site) for site in ("oslo", "lisbon", "quito")}
        namespaces.add(self.name)
        namespaces.ip(self.name, [f"link add eth0 address {MAC} type veth peer name cable"])
        namespaces.ip(self.name, [f"addr add {ADDRESS}/24 dev eth0", "link set eth0 up"])
        self.plug("oslo", self.name)
        namespaces.ip(self.name, ["route add default via 10.77.0.1"])

    def plug(self, site: str, where: str) -> None:
        namespaces.ip(where, [f"link set cable netns {self.lab.namespace(site)}"])
        namespaces.ip(self.lab.namespace(site), ["link set cable master br0 up"])
        self.site = site

    def do(self, site: str, method: str, *words: object) -> None:
        namespaces.call(self.lab.namespace(site), lambda: getattr(self.records[site], method)(*words))

    def open(self, home: str, away: str, link: str) -> None:
        ends = self.lab.address(home, link), self.lab.address(away, link)
        vni = vni_of(link)
        self.do(home, "open", end("home", owner=home, local=ends[0], remote=ends[1], vni=vni))
        self.do(away, "open", end("away", owner=away, local=ends[1], remote=ends[0], vni=vni))

    def move(self, to: str) -> None:
        """As a handoff does: the guest leaves, runs there, and what comes for it follows."""
        source = self.site
        self.do(to, "come_home", "web1")
        self.plug(to, self.lab.namespace(source))
        self.do(source, "lead_away", "web1")

    def answers(self) -> bool:
        said = self.lab.exec("client", ["ping", "-c", "3", "-i", "0.1", "-W", "1", ADDRESS], check=False)
        large = self.lab.exec(
            "client", ["ping", "-c", "1", "-W", "1", "-s", "1472", "-M", "dont", ADDRESS], check=False
        )
        return said.returncode == 0 and large.returncode == 0


@contextlib.contextmanager
def moving(tmp_path: Path) -> Iterator[Moving]:
    with lab(SITES) as made:
        guest = Moving(made, tmp_path)
        try:
            made.route_guest("client", ADDRESS, "oslo")
            yield guest
        finally:
            namespaces.delete(guest.name)


@pytest.mark.root
@pytest.mark.parametrize("both", [False, True], ids=["alone", "beside one of IPv4"])
def test_an_ipv6_address_is_kept_too(tmp_path: Path, both: bool) -> None:
    address = "fd78::10"
    with lab(SITES.replace("[[site]]", "ipv6 = true\n[[site]]", 1)) as made:
        guest = f"tunguest-{os.getpid()}-{next(_serial)}"
        namespaces.add(guest, ipv6=True)
        try:
            namespaces.ip(guest, [f"link add eth0 address {MAC} type veth peer name cable"])
            namespaces.ip(guest, [f"addr add {address}/128 dev eth0 nodad", "link set eth0 up"])

            def plug(site: str, where: str) -> None:
                namespaces.ip(where, [f"link set cable netns {made.namespace(site)}"])
                namespaces.ip(made.namespace(site), ["link set cable master br0 up"])

            plug("oslo", guest)
            if both:
                namespaces.ip(guest, [f"addr add {ADDRESS}/24 dev eth0", "route add default via 10.77.0.1"])
                made.route_guest("client", ADDRESS, "oslo")
            gateway = made.call("oslo", lambda: link_local(mac_of("br0")))
            namespaces.ip(guest, [f"route add default via {gateway} dev eth0"])
            via, source = made.address6("oslo", "client-oslo"), made.address6("client")
            made.exec("client", ["ip", "route", "add", f"{address}/128", "via", via, "src", source])
            made.exec("oslo", ["ip", "route", "add", f"{address}/128", "dev", "br0"])
            records = {site: Records(tmp_path / site) for site in ("oslo", "lisbon")}
            ends = made.address("oslo", "oslo-lisbon"), made.address("lisbon", "oslo-lisbon")

            def answers() -> bool:
                words = ["ping", "-6", "-c", "3", "-i", "0.1", "-W", "1", address]
                large = ["ping", "-6", "-c", "2", "-i", "0.2", "-W", "1", "-s", "1452", "-M", "dont", address]
                four = [["ping", "-c", "3", "-i", "0.1", "-W", "1", ADDRESS]] if both else []
                return all(made.exec("client", line, check=False).returncode == 0 for line in (words, large, *four))

            def open_end(site: str, role: str, local: str, remote: str) -> None:
                made_end = end(role, owner=site, local=local, remote=remote)
                kept = {"also": address} if both else {"address": address}
                six = msgspec.structs.replace(made_end, **kept)
                namespaces.call(made.namespace(site), lambda: records[site].open(six))

            wait_for(answers, 20, "the guest at home")
            open_end("oslo", "home", *ends)
            open_end("lisbon", "away", *reversed(ends))
            plug("lisbon", made.namespace("oslo"))
            assert not answers(), "it has left"
            namespaces.call(made.namespace("oslo"), lambda: records["oslo"].lead_away("web1"))
            wait_for(answers, 20, "the guest through the tunnel")
            for site in ("oslo", "lisbon"):
                namespaces.call(made.namespace(site), lambda site=site: records[site].close("web1"))
                words = ("rule", "route show table all")
                said = "".join(made.exec(site, ["ip", "-6", *line.split()]).stdout for line in words)
                assert traces(made, site) == [] and not re.search(r"table 75|lookup 75|metric 75", said), said
        finally:
            namespaces.delete(guest)


def traces(made: Lab, site: str) -> list[str]:
    """What a tunnel could leave behind."""
    shown = [made.exec(site, words).stdout for words in (["ip", "link"], ["ip", "rule"], ["ip", "neigh"])]
    shown.append(made.exec(site, ["ip", "route", "show", "table", "all"]).stdout)
    return [line for text in shown for line in text.splitlines() if "hx-" in line or "hy-" in line or "75" in line[:4]]


@pytest.mark.root
def test_a_guest_that_moves_is_reached_at_its_old_address_and_comes_home(tmp_path: Path) -> None:
    with moving(tmp_path) as guest:
        assert guest.answers()
        guest.open("oslo", "lisbon", "oslo-lisbon")
        assert guest.answers(), "a tunnel that does not lead yet changes nothing"
        guest.move("lisbon")
        assert guest.answers(), "there and back through the old site, full packets too"
        crossed = namespaces.call(
            guest.lab.namespace("oslo"),
            lambda: packets(guest.records["oslo"].find("web1", "home")),  # type: ignore[arg-type]
        )
        assert crossed >= 8, "requests and answers both took the tunnel"
        guest.move("oslo")
        guest.do("oslo", "close", "web1")
        guest.do("lisbon", "close", "web1")
        assert guest.answers()
        assert traces(guest.lab, "oslo") == traces(guest.lab, "lisbon") == []


@pytest.mark.root
def test_a_guest_that_moves_on_is_reached_through_a_chain(tmp_path: Path) -> None:
    with moving(tmp_path) as guest:
        guest.open("oslo", "lisbon", "oslo-lisbon")
        guest.move("lisbon")
        guest.open("lisbon", "quito", "lisbon-quito")
        guest.move("quito")
        assert guest.answers()
        for site in ("oslo", "lisbon", "quito"):
            guest.do(site, "close", "web1")
            assert traces(guest.lab, site) == [] and guest.records[site].all() == []
        assert not guest.answers(), "it was the tunnels"


@pytest.mark.root
def test_what_the_host_refuses_leaves_nothing(tmp_path: Path) -> None:
    with lab(SITES) as made:
        records = Records(tmp_path)

        def refuse() -> None:
            assert mac_of("br0") == GATEWAY_MAC
            bad = Tunnel(**{**{n: getattr(end("away"), n) for n in Tunnel.__struct_fields__}, "bridge": "nosuch"})
            with pytest.raises(HaulierError, match="nosuch"):
                records.open(bad)

        namespaces.call(made.namespace("oslo"), refuse)
        assert traces(made, "oslo") == [] and records.all() == []
