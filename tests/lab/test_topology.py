from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.errors import UsageError
from haulier.lab import topology
from haulier.lab.shaper import Shape

DEMO = """
name = "demo"
[[site]]
name = "oslo"
guest_gateway = "10.77.0.1/24"
[[site]]
name = "lisbon"
guest_gateway = "10.77.0.1/24"
[[site]]
name = "client"
[[link]]
a = "oslo"
b = "lisbon"
rate = "10mbit"
delay = "25ms"
jitter = "2ms"
loss = "0.5%"
queue = "64kB"
[[link]]
a = "lisbon"
b = "oslo"
rate = "1gbit"
b_to_a = { rate = "2mbit", delay = "100us", up = false }
[[link]]
a = "client"
b = "oslo"
delay = "5ms"
[[link]]
a = "client"
b = "lisbon"
delay = "15ms"
"""


def test_reads_a_description_from_text_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "demo.toml"
    file.write_text(DEMO)
    found = topology.load(file)
    assert found == topology.load(DEMO)
    assert [site.name for site in found.sites] == ["oslo", "lisbon", "client"]
    assert [link.name for link in found.links] == ["oslo-lisbon", "lisbon-oslo-2", "client-oslo", "client-lisbon"]
    first, second = found.links[:2]
    assert first.a_to_b == first.b_to_a
    assert first.a_to_b == Shape(rate_bps=10e6, delay_s=0.025, jitter_s=0.002, loss=0.005, queue_bytes=64_000)
    assert second.a_to_b == Shape(rate_bps=1e9)
    assert second.b_to_a == Shape(rate_bps=2e6, delay_s=0.0001, up=False)
    assert found.site("oslo").guest_gateway == found.site("lisbon").guest_gateway
    assert found.site("client").guest_gateway is None


def test_every_link_has_a_subnet_and_addresses_of_its_own() -> None:
    found = topology.load(DEMO)
    addresses = [link.address(end).ip for link in found.links for end in (link.a, link.b)]
    addresses += [site.address for site in found.sites]
    assert len(set(addresses)) == len(addresses)
    for link in found.links:
        assert link.subnet.prefixlen == 30
        assert link.address(link.a) == link.address_a
        assert link.address(link.b).ip in link.subnet
        assert link.other(link.a) == link.b


def test_subnet_address_and_mtu_can_be_chosen() -> None:
    found = topology.load(
        """
        name = "x"
        [[site]]
        name = "a"
        address = "192.0.2.1"
        [[site]]
        name = "b"
        [[link]]
        a = "a"
        b = "b"
        name = "fibre"
        subnet = "198.51.100.8/29"
        mtu = 1400
        """
    )
    link = found.link("fibre")
    assert str(link.address_a) == "198.51.100.9/29"
    assert str(link.address_b) == "198.51.100.10/29"
    assert link.mtu == 1400
    assert str(found.site("a").address) == "192.0.2.1"


def test_routes_take_the_quickest_way_and_name_the_sites_own_address_as_source() -> None:
    found = topology.load(DEMO)
    # By way of oslo the second link of oslo and lisbon (nearly no delay) beats client's direct 15 ms.
    routes = {str(route.to): route for route in found.routes("client")}
    lisbon = routes["10.90.0.2/32"]
    assert lisbon.via == found.link("client-oslo").address("oslo").ip
    assert lisbon.source == found.site("client").address
    # Nearest holder of the guests' subnet.
    assert routes["10.77.0.0/24"].via == found.link("client-oslo").address("oslo").ip
    assert "10.77.0.0/24" not in {str(route.to) for route in found.routes("oslo")}


def test_every_address_is_reached_without_loops_from_everywhere() -> None:
    found = topology.load(DEMO)
    tables = {site.name: found.routes(site.name) for site in found.sites}
    owners = {IPv4Network(site.address): site.name for site in found.sites}
    owners |= {IPv4Network(link.address(end).ip): end for link in found.links for end in (link.a, link.b)}
    for start in tables:
        for address, owner in owners.items():
            here = start
            for _ in range(len(tables)):
                direct = [link for link in found.links_of(here) if address.subnet_of(link.subnet)]
                if here == owner:
                    break
                if direct:
                    here = direct[0].other(here)
                    continue
                hop = next(route for route in tables[here] if route.to == address)
                link = next(link for link in found.links if link.interface == hop.interface)
                here = link.other(here)
                assert hop.via == link.address(here).ip
            assert here == owner


def test_ipv6_stands_beside_ipv4_where_it_is_asked_for() -> None:
    text = """
name = "six"
ipv6 = true
[[site]]
name = "a"
[[site]]
name = "b"
[[site]]
name = "c"
[[link]]
a = "a"
b = "b"
[[link]]
a = "b"
b = "c"
"""
    made = topology.load(text)
    assert str(made.site("b").address6) == "fd90::2"
    assert str(made.links[1].address6("c")) == "fd91:0:0:1::2/126"
    ways = {str(route.to): (str(route.via), str(route.source)) for route in made.routes("a") if route.to.version == 6}
    assert ways == {
        "fd90::2/128": ("fd91::2", "fd90::1"),
        "fd90::3/128": ("fd91::2", "fd90::1"),
        "fd91:0:0:1::1/128": ("fd91::2", "None"),
        "fd91:0:0:1::2/128": ("fd91::2", "None"),
    }
    without = topology.load(text.replace("ipv6 = true", ""))
    assert without.site("b").address6 is without.links[1].address6("c") is None
    assert all(route.to.version == 4 for route in without.routes("a"))
    with pytest.raises(UsageError, match="ipv6"):
        topology.load(text.replace("true", "1"))


def test_path_between_sites_that_are_not_joined() -> None:
    text = 'name="x"\n[[site]]\nname="a"\n[[site]]\nname="b"\n'
    found = topology.load(text)
    assert found.routes("a") == []
    with pytest.raises(UsageError, match="no way from a to b"):
        found.path("a", "b")


@pytest.mark.parametrize(
    ("value", "expected"),
    [("10mbit", 10e6), ("2.5 Mbit", 2.5e6), ("1gbit", 1e9), ("64kbit", 64e3), ("9000bit", 9e3), (5e6, 5e6), ("0", 0)],
)
def test_rates(value: object, expected: float) -> None:
    assert topology.parse_rate(value) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "expected"), [("25ms", 0.025), ("1s", 1), ("100us", 1e-4), (0.5, 0.5), ("0", 0)])
def test_times(value: object, expected: float) -> None:
    assert topology.parse_time(value) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "expected"), [("64kB", 64000), ("64KiB", 65536), ("1MB", 10**6), (5000, 5000)])
def test_sizes(value: object, expected: int) -> None:
    assert topology.parse_size(value) == expected


@pytest.mark.parametrize(("value", "expected"), [("1%", 0.01), ("0.5", 0.5), (0.25, 0.25), ("100%", 1)])
def test_losses(value: object, expected: float) -> None:
    assert topology.parse_loss(value) == pytest.approx(expected)


@pytest.mark.parametrize("value", ["", "fast", "10", "10mbps x", "-5mbit", "1e9bit", True, None, [], "9" * 50 + "bit"])
def test_values_that_are_no_rate_are_refused(value: object) -> None:
    if value == "10":
        assert topology.parse_rate(value) == 10
        return
    with pytest.raises(UsageError, match="give a rate like"):
        topology.parse_rate(value)


@given(st.text(max_size=30))
def test_any_text_is_a_quantity_or_a_usage_error(text: str) -> None:
    for parser in (topology.parse_rate, topology.parse_time, topology.parse_size, topology.parse_loss):
        try:
            assert parser(text) >= 0
        except UsageError:
            pass


SITES = 'name = "x"\n[[site]]\nname = "a"\n[[site]]\nname = "b"\n'
LINK = '[[link]]\na = "a"\nb = "b"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the lab: name = None"),
        ('name = "x"', "1 to 200 sites"),
        ('name = "UP"\n[[site]]\nname="a"', "the lab: name = 'UP'"),
        ('name = "../x"\n[[site]]\nname="a"', "lower-case"),
        ('name = "x"\n[[site]]\nname = "a b"', "site 1: name"),
        ('name = "x"\nlinks = 1\n[[site]]\nname = "a"', "unknown key 'links'"),
        ('name = "x"\nsite = "a"', r"\[\[site\]\]"),
        ('name = "x"\n[[site]]\nname = "a"\n[[site]]\nname = "a"', "site a is described twice"),
        ('name = "x"\n[[site]]\nname = "a"\nguest_gateway = "10.0.0.300/24"', "site a: "),
        ('name = "x"\n[[site]]\nname = "a"\nguest_gateway = "10.0.0.1"', "write the length"),
        ('name = "x"\n[[site]]\nname = "a"\nguest_gateway = 7', "write it in quotes"),
        (SITES + '[[link]]\na = "a"\nb = "c"', "b = 'c' is no site"),
        (SITES + '[[link]]\na = "a"\nb = "a"', "to itself"),
        (SITES + LINK + 'speed = "1mbit"', "unknown key 'speed'"),
        (SITES + LINK + 'rate = "10"\n', "link a-b: a rate of 10 bit/s"),
        (SITES + LINK + 'jitter = "5ms"', "jitter"),
        (SITES + LINK + 'loss = "200%"', "a loss of 2"),
        (SITES + LINK + 'up = "no"', "true or false"),
        (SITES + LINK + "a_to_b = 5", "a_to_b is a table"),
        (SITES + LINK + 'a_to_b = { name = "z" }', "a_to_b: unknown key"),
        (SITES + LINK + "mtu = 100", "mtu = 100"),
        (SITES + LINK + 'subnet = "10.1.1.1/30"', "subnet"),
        (SITES + LINK + 'subnet = "10.1.1.0/31"', "no room for two"),
        (SITES + LINK + 'subnet = "10.90.0.0/29"', "overlap"),
        (SITES + LINK + 'name = "l"\n' + LINK + 'name = "l"', "link l is described twice"),
        (SITES + LINK + 'name = "a-b-2"\n' + LINK, "which is taken"),
        (DEMO.replace("10.77.0.1", "10.77.0.2", 1), "not the gateway"),
        (DEMO.replace("10.77.0.1/24", "10.91.0.1/24"), "overlap"),
        ("name = ", "not TOML"),
        ("a" * (topology.MAX_TEXT + 1), "larger than"),
    ],
)
def test_bad_descriptions_say_what_is_off(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        topology.load(text)


def test_missing_file_and_unknown_names() -> None:
    with pytest.raises(UsageError, match="cannot read topology"):
        topology.load(Path("/nonexistent/demo.toml"))
    found = topology.load(DEMO)
    with pytest.raises(UsageError, match="no site 'rome': it has oslo, lisbon, client"):
        found.site("rome")
    with pytest.raises(UsageError, match="no link 'x'"):
        found.link("x")
    with pytest.raises(UsageError, match="joins"):
        found.link("client-oslo").address("lisbon")
