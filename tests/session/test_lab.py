"""Sessions between sites of a lab: real TCP over shaped links, and links that go down under it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from haulier.lab import namespaces
from haulier.lab.lab import Lab
from haulier.network.addresses import Uplink
from haulier.network.mptcp import apply, plan
from haulier.session.mptcp import available
from tests.support.certs import TestCa
from tests.support.labs import lab
from tests.support.waiting import wait_for

pytestmark = pytest.mark.root

SITES = 'name = "sess"\n[[site]]\nname = "oslo"\n[[site]]\nname = "lisbon"\n'
LINK = '[[link]]\na = "oslo"\nb = "lisbon"\nrate = "{}"\ndelay = "25ms"\n'


class Transfer:
    """oslo sends `count` messages of 100 kB to lisbon over all links between them."""

    def __init__(self, made: Lab, certs: Path, count: int, *, ipv6: bool = False, mptcp: bool = False) -> None:
        more = ["mptcp"] if mptcp else []
        program = [sys.executable, "-m", "tests.support.session_peer"]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True}
        listen = "listen6" if ipv6 else "listen"
        self.listener = made.popen("lisbon", [*program, listen, str(certs), "lisbon", "oslo", *more], **options)
        port = int(self.listener.stdout.readline())
        links = made.links_between("oslo", "lisbon")
        hosts = [f"{made.address('lisbon', link)}:{port}" for link in links]
        if ipv6:
            hosts = [f"[{made.address6('lisbon', link)}]:{port}" for link in links]
        self.began = time.monotonic()
        words = [*program, "connect", str(certs), "oslo", "lisbon", str(count), *hosts, *more]
        self.connector = made.popen("oslo", words, **options)

    def under_way(self) -> None:
        assert self.connector.stdout.readline() == "under way\n"

    def results(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return json.loads(self.connector.stdout.readline()), json.loads(self.listener.stdout.readline())

    def close(self) -> None:
        for process in (self.connector, self.listener):
            process.kill()
            process.wait()
            process.stdout.close()


@contextmanager
def transfer(made: Lab, tmp_path: Path, count: int, *, ipv6: bool = False, mptcp: bool = False) -> Iterator[Transfer]:
    ca = TestCa(tmp_path)
    ca.site("oslo"), ca.site("lisbon")
    one = Transfer(made, tmp_path, count, ipv6=ipv6, mptcp=mptcp)
    try:
        yield one
    finally:
        one.close()


def test_two_links_carry_one_session_and_tell_their_figures(tmp_path: Path) -> None:
    with lab(SITES + LINK.format("10mbit") + LINK.format("20mbit")) as made, transfer(made, tmp_path, 100) as one:
        one.under_way()
        sent, got = one.results()
        crossed = [made.wire_bytes(link)[0] for link in made.links_between("oslo", "lisbon")]
    assert got == {"got": 100, "right": True, "error": ""}
    assert sent["error"] == ""
    assert sum(path["resent"] for path in sent["paths"]) == 0
    assert sum(crossed) < 1.06 * 100 * 100_000
    assert min(crossed) > 0.2 * sum(crossed)


def test_a_link_that_goes_down_is_done_without_and_used_again(tmp_path: Path) -> None:
    with lab(SITES + LINK.format("10mbit") * 2) as made, transfer(made, tmp_path, 200) as one:
        one.under_way()
        name = made.links_between("oslo", "lisbon")[1]
        made.link(name).set(up=False)
        quiet = made.wire_bytes(name)[0]
        other = made.links_between("oslo", "lisbon")[0]
        before = made.wire_bytes(other)[0]
        wait_for(lambda: made.wire_bytes(other)[0] > before + 4_000_000, 30, "the other link carries on")
        made.link(name).set(up=True)
        # Within two seconds, at 1.25 MB a second.
        wait_for(lambda: made.wire_bytes(name)[0] > quiet + 100_000, 4, "the link is used again")
        sent, got = one.results()
    assert got == {"got": 200, "right": True, "error": ""}
    assert 0 < sum(path["resent"] for path in sent["paths"]) < 1_000_000


def test_paths_may_be_ipv6(tmp_path: Path) -> None:
    text = SITES.replace("\n", "\nipv6 = true\n", 1) + LINK.format("10mbit") * 2
    with lab(text) as made, transfer(made, tmp_path, 40, ipv6=True) as one:
        sent, got = (one.under_way(), one.results())[1]
        crossed = [made.wire_bytes(link)[0] for link in made.links_between("oslo", "lisbon")]
    assert got == {"got": 40, "right": True, "error": ""}
    assert sent["transport"] == "striping over 2 paths"
    assert all("[fd91" in path["name"] and path["loss"] < 0.1 for path in sent["paths"])
    assert min(crossed) > 0.2 * sum(crossed)


@pytest.mark.skipif(not available(), reason="this kernel has no MPTCP")
@pytest.mark.parametrize("prepared", [True, False], ids=["set up", "not set up"])
def test_mptcp_is_used_when_all_its_subflows_came_up_and_else_striping(tmp_path: Path, prepared: bool) -> None:
    with lab(SITES + LINK.format("10mbit") * 2) as made:
        if prepared:
            first, second = made.links_between("oslo", "lisbon")
            uplink = Uplink("wan1", made.address("oslo", second), "10.91.0.4/30")
            steps = plan(made.address("lisbon", first), [(uplink, made.address("lisbon", second))])
            namespaces.call(made.namespace("oslo"), lambda: apply(steps))
        with transfer(made, tmp_path, 120, mptcp=True) as one:
            one.under_way()
            sent, got = one.results()
            crossed = [made.wire_bytes(link)[0] for link in made.links_between("oslo", "lisbon")]
    assert got == {"got": 120, "right": True, "error": ""}
    if prepared:
        assert sent["transport"] == "MPTCP, 2 subflows"
    else:
        assert sent["transport"] == "striping over 2 paths (only 1 of 2 subflows came up)"
    assert min(crossed) > 0.2 * sum(crossed)


@pytest.mark.full
def test_a_total_outage_of_20_s_costs_a_window(tmp_path: Path) -> None:
    with lab(SITES + LINK.format("10mbit") * 2) as made, transfer(made, tmp_path, 150) as one:
        one.under_way()
        names = made.links_between("oslo", "lisbon")
        for name in names:
            made.link(name).set(up=False)
        end = time.monotonic() + 20
        wait_for(lambda: time.monotonic() > end, 30)
        assert one.connector.poll() is one.listener.poll() is None
        for name in names:
            made.link(name).set(up=True)
        sent, got = one.results()
    assert got == {"got": 150, "right": True, "error": ""}
    assert 0 < sum(path["resent"] for path in sent["paths"]) < 1_000_000
