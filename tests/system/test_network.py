"""Clients keep their connections to a guest that moves, whatever the paths between its sites."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from haulier.containers.criu import find_criu, self_test
from haulier.errors import Unsupported
from haulier.guests.agent import GuestAgent
from haulier.handoff.residence import guest_paths
from haulier.lab.container_clients import Player
from haulier.lab.containers import container_template
from haulier.lab.lab import Lab
from haulier.lab.scenario import GUEST_ADDRESS, GUEST_ADDRESS6, POOLS, POOLS6, LabSite, Template, wan
from haulier.lab.workload import PORT
from haulier.network.pool import Pool
from haulier.session.mptcp import available, protocol, subflows
from tests.support.waiting import wait_for
from tests.system.stage import Stage, stage
from tests.system.test_containers import container_stage

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(400)]
HOST = GUEST_ADDRESS.partition("/")[0]
LATER = ("connect", "disk", "memory", "switchover", "token", "finish")
"""Phases of a source, in order: one may be over before it is seen."""
POOLS_AT = {site: Pool.parse(text) for site, text in POOLS.items()}
POOLS6_AT = {site: Pool.parse(text) for site, text in POOLS6.items()}


class OneConnection:
    """A client that asks the guest's service again and again over one TCP connection, as long as it holds."""

    def __init__(self, lab: Lab, host: str = HOST, port: int = PORT, mptcp: bool = False) -> None:
        def dial() -> socket.socket:
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, kind)
            sock.settimeout(30)
            sock.connect((host, port))
            return sock

        kind = protocol(mptcp)
        self._sock = lab.call("client", dial)
        self.answers: list[float] = []
        self.error = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            file = self._sock.makefile("rb")
            while not self._over.wait(0.02):
                self._sock.sendall(b'{"cmd": "stats"}\n')
                if not json.loads(file.readline())["ok"]:
                    raise ValueError("a wrong answer")
                self.answers.append(time.monotonic())
        except (OSError, ValueError) as error:
            if not self._over.is_set():
                self.error = repr(error)

    def subflows(self) -> int:
        """Of an MPTCP connection."""
        return subflows(self._sock)

    def assert_goes_on(self) -> None:
        count = len(self.answers)
        wait_for(lambda: len(self.answers) > count + 5 or self.error, 30, "answers over the same connection")
        assert not self.error

    def close(self) -> None:
        self._over.set()
        self._sock.close()
        self._thread.join(10)


def tunnels(site: LabSite) -> list[dict[str, Any]]:
    return list(site.facts("doctor", "--network")["tunnels"])


def traces(lab: Lab, site: str) -> list[str]:
    """What tunnels and MPTCP could leave behind in a site's network."""
    words = ("link", "rule", "route show table all", "-6 rule", "-6 route show table all", "neigh", "mptcp endpoint")
    shown = "\n".join(lab.exec(site, ["ip", *line.split()]).stdout for line in words)
    return [
        line
        for line in shown.splitlines()
        if re.search(r"h[xy]-|table 7[45]|lookup 7[45]|metric 75|PERMANENT|subflow", line)
    ]


def settings(site: LabSite) -> None:
    """Uplinks are looked for, the second one costs something, and no hook leads the clients."""
    config = site.root / "site.toml"
    text = re.sub(r"bulk = .*", 'bulk = ["auto"]', config.read_text())
    text = re.sub(r"moved_hook = .*", 'moved_hook = ""', text)
    config.write_text(text + '[[path]]\nuplink = "wan1"\ncost = 5\n')
    site.kill_agent()
    site.start_agent()


@pytest.fixture(scope="module")
def running(made: Template) -> Iterator[Stage]:
    with stage(made, "net", [wan("20mbit", "10ms"), wan("20mbit", "10ms")]) as standing:
        for site in standing.scenario.sites.values():
            settings(site)
        standing.run_guest("web1", random_share=0.5)
        assert standing.site("oslo").facts("guest", "net", "web1", "keep")["net"] == "keep"
        yield standing


def test_one_connection_outlives_the_way_there_and_back_without_a_hook(running: Stage) -> None:
    lab = running.scenario.lab
    client = OneConnection(lab)
    try:
        client.assert_goes_on()
        there = running.begin("web1", "--paths", "cheap")
        report = there.done()
        client.assert_goes_on()
        running.assert_clean(there, "lisbon")
        running.assert_right()
        # Of two paths, found by probing, the dear one was kept in reserve.
        found = {path["cost"]: path for path in report["wire"]["paths"]}
        assert set(found) == {0, 5} and found[0]["acked"] > 100_000 and found[5]["sent"] == 0, report["wire"]
        assert found[0]["name"].startswith("wan0>"), found
        (home,), (away,) = tunnels(running.site("oslo")), tunnels(running.site("lisbon"))
        assert home["leads"] and home["packets"] > 10 and away["packets"] > 10

        wanted = "mptcp" if available() else "striping"
        back = running.begin("web1", "--transport", wanted, "--paths", "all")
        report = back.done()
        client.assert_goes_on()
        running.assert_clean(back, "oslo")
        running.assert_right()
        assert report["wire"]["transport"] == ("MPTCP, 2 subflows" if available() else "striping over 2 paths"), report[
            "wire"
        ]
    finally:
        client.close()
    for site in ("oslo", "lisbon"):
        wait_for(lambda site=site: not tunnels(running.site(site)), 20, f"no tunnel at {site}")
        assert traces(lab, site) == []


@pytest.mark.full
def test_a_handoff_that_fails_leaves_no_tunnel_no_mptcp_and_the_connection_as_it_was(running: Stage) -> None:
    client = OneConnection(running.scenario.lab)
    try:
        for seed, side in enumerate(("source", "target"), start=3):
            # So that there is much to send each time: what an attempt brought is not sent again.
            running.work("web1", random_share=1.0, seed=seed)
            handoff = running.begin("web1", "--transport", "mptcp")
            handoff.wait_phase(handoff.source, {"memory"})
            assert len(tunnels(running.site(handoff.target))) == 1
            if available():
                assert any("subflow" in line for line in traces(running.scenario.lab, handoff.source))
            handoff.kill_worker(getattr(handoff, side))
            handoff.settled()
            assert handoff.result()[0] != 0
            client.assert_goes_on()
            assert running.home("web1") == handoff.source
            for site in ("oslo", "lisbon"):
                wait_for(lambda site=site: not tunnels(running.site(site)), 30, f"no tunnel at {site}")
                assert traces(running.scenario.lab, site) == []
    finally:
        client.close()


@pytest.mark.full
@pytest.mark.parametrize("phase", ["connect", "memory", "switchover", "token"])
def test_a_path_may_die_in_any_phase(running: Stage, phase: str) -> None:
    """The first one, which the tunnel takes, too; it returns when the guest is there."""
    client = OneConnection(running.scenario.lab)
    first = running.scenario.lab.link(running.links()[0])
    try:
        handoff = running.begin("web1")
        handoff.wait_phase(handoff.source, LATER[LATER.index(phase) :])
        first.set(up=False)
        try:
            handoff.done()
        finally:
            first.set(up=True)
        client.assert_goes_on()
    finally:
        client.close()
    running.assert_right()
    assert running.home("web1") == handoff.target


@pytest.mark.full
def test_a_dear_path_is_used_when_the_deadline_needs_it(running: Stage) -> None:
    running.work("web1", random_share=1.0, seed=7)
    cheap = running.scenario.lab.link(running.links()[0])
    cheap.set(rate_bps=3e6)
    try:
        report = running.begin("web1", "--paths", "deadline", "--deadline", "40").done()
    finally:
        cheap.set(rate_bps=20e6)
    found = {path["cost"]: path for path in report["wire"]["paths"]}
    assert found[5]["acked"] > 1_000_000, found
    assert report["total_s"] < 40
    # With time enough it is not.
    running.work("web1", seed=8)
    report = running.begin("web1", "--deadline", "600").done()
    found = {path["cost"]: path for path in report["wire"]["paths"]}
    assert found[5]["sent"] == 0 and found[0]["acked"] > 100_000, found
    running.assert_right()


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_twenty_handoffs_in_a_row_leak_nothing_and_one_connection_outlives_them(running: Stage) -> None:
    client, began = OneConnection(running.scenario.lab), running.home("web1")
    try:
        for _ in range(20):
            running.begin("web1").done()
            client.assert_goes_on()
    finally:
        client.close()
    running.assert_right()
    assert running.home("web1") == began
    for site in ("oslo", "lisbon"):
        wait_for(lambda site=site: not tunnels(running.site(site)), 20, f"no tunnel at {site}")
        assert traces(running.scenario.lab, site) == []


@pytest.mark.full
def test_all_between_the_sites_may_be_ipv6(made: Template) -> None:
    with stage(made, "net6", [wan("20mbit", "10ms")] * 2, ipv6=True) as standing:
        for site in standing.scenario.sites.values():
            text = (site.root / "site.toml").read_text()
            (site.root / "site.toml").write_text(re.sub(r"moved_hook = .*", 'moved_hook = ""', text))
            site.kill_agent()
            site.start_agent()
        standing.run_guest("web1", random_share=0.5)
        standing.site("oslo").facts("guest", "net", "web1", "keep")
        client = OneConnection(standing.scenario.lab)
        try:
            for words in (["--transport", "striping"], ["--transport", "mptcp"]):
                report = standing.begin("web1", *words).done()
                client.assert_goes_on()
                standing.assert_right()
                assert all("[fd91" in path["name"] for path in report["wire"]["paths"]), report["wire"]
                expected = "MPTCP, 2 subflows" if available() and "mptcp" in words else "striping over 2 paths"
                assert report["wire"]["transport"] == expected
        finally:
            client.close()
        assert standing.home("web1") == "oslo"


@pytest.mark.parametrize(
    "address",
    [
        pytest.param(GUEST_ADDRESS, id="one of each"),
        pytest.param(GUEST_ADDRESS6, id="IPv6 alone", marks=pytest.mark.full),
    ],
)
def test_a_guests_own_address_may_be_ipv6(made: Template, address: str) -> None:
    """An IPv6 connection outlives moves with `keep`, by the tunnel and home again, and with `hook`."""
    six = GUEST_ADDRESS6.partition("/")[0]
    also = GUEST_ADDRESS6 if address != GUEST_ADDRESS6 else ""
    with stage(made, "own6", [wan("20mbit", "10ms")], ipv6=True) as standing:
        lab, oslo = standing.scenario.lab, standing.site("oslo")
        hook = standing.scenario.work / "moved-hook"
        leads = hook.read_text()
        standing.scenario.start_guest("web1", address, address6=also)
        standing.addresses["web1"] = address
        with GuestAgent(guest_paths(oslo.site, "web1").qga_sock, name="web1") as agent:
            agent.check(["/usr/bin/python3", "-c", RELAY])
        six_client = OneConnection(lab, six, MPTCP_PORT)
        clients = [six_client, OneConnection(lab)] if also else [six_client]
        try:
            oslo.facts("guest", "net", "web1", "keep")
            # Where a tunnel would lead over IPv6, with links of 1500 bytes.
            said = "packets of 1430 bytes whole, as the path takes 1500"
            assert any(said in text for text in oslo.facts("plan", "web1", "--to", "lisbon")["clients"])
            (path,) = oslo.facts("doctor", "--network")["tunnel_mtu"]["lisbon"]
            assert path["found"] == path["route"] == 1500 and said in path["advice"], path
            hook.write_text("#!/bin/sh\nexit 1\n")
            for home in ("lisbon", "oslo"):
                handoff = standing.begin("web1")
                handoff.done()
                for client in clients:
                    client.assert_goes_on()
                standing.assert_clean(handoff, home)
                assert len(tunnels(oslo)) == (home == "lisbon")
            for site in ("oslo", "lisbon"):
                assert_no_trace(standing, site)
            oslo.facts("guest", "net", "web1", "hook")
            hook.write_text(leads)
            for _ in range(2):
                handoff = standing.begin("web1")
                handoff.done()
                for client in clients:
                    client.assert_goes_on()
                via = lab.exec("client", ["ip", "-6", "route", "get", six]).stdout
                assert lab.address6(handoff.target, f"client-{handoff.target}") in via
                assert tunnels(oslo) == tunnels(standing.site("lisbon")) == []
        finally:
            for client in clients:
                client.close()


@pytest.mark.full
def test_a_container_keeps_its_address_too() -> None:
    try:
        problem = self_test(find_criu().path)
    except Unsupported as error:
        problem = str(error)
    if problem:
        pytest.skip(f"containers cannot be handed over on this machine: {problem}")
    with container_stage(container_template(), "keep", [wan("50mbit", "10ms")]) as standing:
        for site in standing.scenario.sites.values():
            settings(site)
        standing.run_container("game1", "game", "--net", "keep")
        player = Player(standing.scenario.lab, "client", HOST)
        wait_for(lambda: len(player.ticks) > 10, 30, "the game")
        try:
            for home in ("lisbon", "oslo"):
                standing.go("game1")
                count = len(player.ticks)
                wait_for(lambda count=count: len(player.ticks) > count + 20, 30, f"the game at {home}")
                assert len(tunnels(standing.site("oslo"))) == (home == "lisbon")
        finally:
            player.close()
        assert player.wrong() == []
        for site in ("oslo", "lisbon"):
            wait_for(lambda site=site: not tunnels(standing.site(site)), 20, f"no tunnel at {site}")
            assert traces(standing.scenario.lab, site) == []
        standing.end_container("game1")


# -- connections that move with the guest -----------------------------------------------------------------------------

MPTCP_PORT = 7001
RELAY = f"""
import os, socket, threading
def carry(a, b):
    try:
        while data := a.recv(65536): b.sendall(data)
    except OSError: pass
    for s in (a, b):
        try: s.shutdown(socket.SHUT_RDWR)
        except OSError: pass
if os.fork() == 0:
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2): os.dup2(null, fd)
    l = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 262)
    l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    l.bind(("::", {MPTCP_PORT}))
    l.listen(16)
    while True:
        a, b = l.accept()[0], socket.create_connection(("127.0.0.1", {PORT}))
        for pair in ((a, b), (b, a)): threading.Thread(target=carry, args=pair, daemon=True).start()
"""
"""Inside the guest: MPTCP in front of the workload's service."""


def address_at(site: LabSite) -> str:
    """The guest's address of the site that it is at."""
    return str(site.facts("guest", "show", "web1")["spec"]["site_address"])


@pytest.fixture(scope="module")
def mobile(made: Template) -> Iterator[Stage]:
    with moving_stage(made, "mptcp") as standing:
        yield standing


@contextlib.contextmanager
def moving_stage(made: Template, name: str, *, ipv6: bool = False) -> Iterator[Stage]:
    if not available():
        pytest.skip("no MPTCP in this kernel")
    with stage(made, name, [wan("20mbit", "10ms")], ipv6=ipv6) as standing:
        standing.scenario.give_pools(ipv6=ipv6)
        standing.run_guest("web1", random_share=0.5)
        facts = standing.site("oslo").facts("guest", "net", "web1", "mptcp")
        assert facts["address"] in POOLS_AT["oslo"] or facts["address"] in POOLS6_AT["oslo"], facts
        assert any("mptcpize" in remark for remark in facts["remarks"]), "nobody listens with MPTCP yet"
        with GuestAgent(guest_paths(standing.site("oslo").site, "web1").qga_sock, name="web1") as agent:
            agent.check(["/usr/bin/python3", "-c", RELAY])
        yield standing


def assert_no_trace(standing: Stage, site: str) -> None:
    wait_for(lambda: not tunnels(standing.site(site)), 20, f"no tunnel at {site}")
    assert traces(standing.scenario.lab, site) == []


def test_an_mptcp_connection_moves_to_an_address_of_the_new_site_and_no_tunnel_stays(mobile: Stage) -> None:
    lab = mobile.scenario.lab
    client = OneConnection(lab, address_at(mobile.site("oslo")), MPTCP_PORT, mptcp=True)
    try:
        client.assert_goes_on()
        for to, join in (("lisbon", "ahead"), ("oslo", "after")):
            handoff = mobile.begin("web1", "--join", join)
            handoff.done()
            client.assert_goes_on()
            mobile.assert_clean(handoff, to)
            mobile.assert_right()
            new = mobile.site(to)
            wait_for(lambda new=new: address_at(new) in POOLS_AT[new.name], 30, "its address of the new site")
            handoff.settled()
            for site in ("oslo", "lisbon"):
                assert_no_trace(mobile, site)
            # What it had of the old site is gone there, too; the connection goes on without either.
            old = mobile.site(handoff.source)
            wait_for(lambda old=old: not old.facts("doctor", "--network")["addresses"], 30, "no lease at the old site")
            client.assert_goes_on()
    finally:
        client.close()


@pytest.mark.full
def test_a_plain_connection_keeps_its_address_until_it_ends(mobile: Stage) -> None:
    """And the MPTCP connection beside it moves."""
    lab, host = mobile.scenario.lab, address_at(mobile.site("oslo"))
    plain, mptcp = OneConnection(lab, host), OneConnection(lab, host, MPTCP_PORT, mptcp=True)
    try:
        handoff = mobile.begin("web1")
        handoff.done()
        for client in (plain, mptcp):
            client.assert_goes_on()
        wait_for(lambda: address_at(mobile.site("lisbon")) in POOLS_AT["lisbon"], 30, "its address of the new site")
        assert len(tunnels(mobile.site("lisbon"))) == 1
        plain.close()
        wait_for(lambda: not tunnels(mobile.site("lisbon")), 90, "no tunnel when nobody needs it")
        mptcp.assert_goes_on()
        handoff.settled()
        mobile.begin("web1").done()
        mptcp.assert_goes_on()
    finally:
        plain.close()
        mptcp.close()
    for site in ("oslo", "lisbon"):
        assert_no_trace(mobile, site)


DEAF = "table inet deaf { chain in { type filter hook input priority 0; tcp option mptcp subtype 3 drop; }; }"
"""Addresses that peers announce (ADD_ADDR) do not arrive."""


@pytest.mark.full
def test_an_address_is_announced_again_until_somebody_has_heard_of_it(mobile: Stage) -> None:
    """Linux itself gives up after a few lost packets."""
    lab = mobile.scenario.lab
    client = OneConnection(lab, address_at(mobile.site("oslo")), MPTCP_PORT, mptcp=True)
    try:
        lab.exec("client", ["nft", DEAF])
        try:
            handoff = mobile.begin("web1", "--join", "after")
            handoff.done()
            wait_for(lambda: address_at(mobile.site("lisbon")) in POOLS_AT["lisbon"], 30, "its address of the new site")
            client.assert_goes_on()
            assert len(tunnels(mobile.site("lisbon"))) == 1, "it goes by the old address"
        finally:
            lab.exec("client", ["nft", "delete table inet deaf"])
        wait_for(lambda: not tunnels(mobile.site("lisbon")), 90, "the connection goes by the new address")
        client.assert_goes_on()
        handoff.settled()
        mobile.begin("web1").done()
        client.assert_goes_on()
    finally:
        client.close()
    for site in ("oslo", "lisbon"):
        assert_no_trace(mobile, site)


@pytest.mark.full
def test_a_handoff_that_fails_takes_the_new_address_back(mobile: Stage) -> None:
    client = OneConnection(mobile.scenario.lab, address_at(mobile.site("oslo")), MPTCP_PORT, mptcp=True)
    try:
        for side in ("source", "target"):
            handoff = mobile.begin("web1")
            handoff.wait_phase(handoff.source, {"memory"})
            handoff.kill_worker(getattr(handoff, side))
            handoff.settled()
            assert handoff.result()[0] != 0
            client.assert_goes_on()
            for site in ("oslo", "lisbon"):
                assert_no_trace(mobile, site)
            with GuestAgent(guest_paths(mobile.site("oslo").site, "web1").qga_sock, name="web1") as agent:
                wait_for(lambda agent=agent: b"10.78.2." not in agent.check(["/sbin/ip", "addr"]), 40, "one address")
        wait_for(lambda: not mobile.site("lisbon").facts("doctor", "--network")["addresses"], 30, "no lease")
        client.assert_goes_on()
    finally:
        client.close()


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_one_mptcp_connection_outlives_twenty_moves(mobile: Stage) -> None:
    client = OneConnection(mobile.scenario.lab, address_at(mobile.site("oslo")), MPTCP_PORT, mptcp=True)
    try:
        for number in range(20):
            handoff = mobile.begin("web1", "--join", "ahead" if number % 2 else "after")
            handoff.done()
            handoff.settled()
            at = mobile.site(mobile.home("web1"))
            wait_for(lambda at=at: address_at(at) in POOLS_AT[at.name], 30, f"move {number}: its new address")
            client.assert_goes_on()
    finally:
        client.close()
    mobile.assert_right()
    for site in ("oslo", "lisbon"):
        assert_no_trace(mobile, site)


@pytest.mark.full
def test_an_mptcp_connection_moves_between_ipv6_addresses(made: Template) -> None:
    """The sites reach each other by IPv6 alone, too."""
    with moving_stage(made, "mptcp6", ipv6=True) as standing:
        client = OneConnection(standing.scenario.lab, address_at(standing.site("oslo")), MPTCP_PORT, mptcp=True)
        try:
            for to, join in (("lisbon", "ahead"), ("oslo", "after")):
                handoff = standing.begin("web1", "--join", join)
                handoff.done()
                client.assert_goes_on()
                handoff.settled()
                at = standing.site(to)
                wait_for(lambda at=at: address_at(at) in POOLS6_AT[at.name], 30, "its address of the new site")
                for site in ("oslo", "lisbon"):
                    assert_no_trace(standing, site)
                client.assert_goes_on()
        finally:
            client.close()
