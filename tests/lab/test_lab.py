"""Labs on a real kernel: calibrated by ping and iperf3, which know nothing of the relay."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.errors import Conflict, HaulierError, PeerError, UnknownThing, UsageError
from haulier.lab import namespaces, netem, processes, state, tun
from haulier.lab.lab import Lab, take_down
from haulier.lab.topology import GATEWAY_MAC
from tests.support.labs import lab, own_name
from tests.support.waiting import wait_for

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="needs root and TUN"),
]

PAIR = """
name = "t-lab"
[[site]]
name = "a"
[[site]]
name = "b"
[[link]]
a = "a"
b = "b"
"""

TRIANGLE = """
name = "t-tri"
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
delay = "1ms"
[[link]]
a = "oslo"
b = "lisbon"
delay = "2ms"
[[link]]
a = "client"
b = "oslo"
delay = "1ms"
[[link]]
a = "client"
b = "lisbon"
delay = "1ms"
"""


def ping(made: Lab, site: str, target: str, *, count: int = 10, size: int = 56) -> tuple[int, float]:
    """(answers, smallest RTT in ms)"""
    argv = ["ping", "-n", "-q", "-c", str(count), "-i", "0.05", "-W", "1", "-s", str(size), target]
    said = made.exec(site, argv, check=False, timeout=60).stdout
    answers = re.search(r"(\d+) received", said)
    shortest = re.search(r"= ([0-9.]+)/", said)
    assert answers, said
    return int(answers[1]), float(shortest[1]) if shortest else float("inf")


def iperf(made: Lab, server: str, client: str, address: str, seconds: float = 3) -> float:
    """Goodput of one TCP connection in Mbit/s, as its receiver saw it."""
    port = "5201"
    with made.popen(
        server, ["iperf3", "-s", "-1", "-p", port, "-B", address], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as serving:
        try:
            wait_for(lambda: f":{port}" in made.exec(server, ["ss", "-Hltn"]).stdout, 10, "iperf3 listens")
            done = made.exec(client, ["iperf3", "-c", address, "-p", port, "-t", str(seconds), "-J"], timeout=60)
            serving.communicate(timeout=20)
        finally:
            serving.kill()
    return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e6


def left_of(name: str) -> list[str]:
    """What a lab left behind: namespaces, relays, files."""
    found = [f"namespace {entry.name}" for entry in namespaces.RUN_NETNS.glob(f"{name}-*")]
    found += [f"relay {pid}" for pid, _ in tun.find(name)]
    found += [f"file {entry}" for entry in state.RUN.iterdir() if name in entry.name]
    return found


@pytest.fixture(scope="module")
def pair() -> Iterator[Lab]:
    with lab(PAIR, backend="tun") as made:
        yield made


@pytest.fixture(scope="module")
def triangle() -> Iterator[Lab]:
    with lab(TRIANGLE, backend="tun") as made:
        yield made


@pytest.mark.parametrize(("mbit", "delay_ms"), [(10, 25), (50, 10)])
def test_link_has_the_rate_and_delay_it_was_given(pair: Lab, mbit: float, delay_ms: float) -> None:
    pair.link("a-b").set(rate_bps=mbit * 1e6, delay_s=delay_ms / 1e3, jitter_s=0, loss=0, queue_bytes=0, up=True)
    answers, rtt = ping(pair, "a", pair.address("b", "a-b"))
    assert answers == 10
    assert 2 * delay_ms - 1.5 <= rtt <= 2 * delay_ms + 5
    before = pair.wire_bytes("a-b")
    goodput = iperf(pair, "b", "a", pair.address("b", "a-b"))
    after = pair.wire_bytes("a-b")
    # TCP carries 1448 of 1500 bytes; a short run also pays for its slow start.
    assert 0.6 * mbit <= goodput <= 0.98 * mbit
    assert after[0] - before[0] >= goodput * 1e6 / 8 * 3 * 0.95
    assert after[1] - before[1] < (after[0] - before[0]) / 5


def test_rate_of_one_direction_changes_while_the_link_is_used(pair: Lab) -> None:
    link = pair.link("a-b")
    link.set(rate_bps=20e6, delay_s=0.005, jitter_s=0, loss=0, up=True)
    fast = iperf(pair, "b", "a", pair.address("b", "a-b"), 2)
    link.set(rate_bps=4e6, source="a")
    slow = iperf(pair, "b", "a", pair.address("b", "a-b"), 2)
    back = iperf(pair, "a", "b", pair.address("a", "a-b"), 2)
    assert 0.6 * 4 <= slow <= 4
    assert fast > 2.5 * slow
    assert back > 2.5 * slow
    assert [shape.rate_bps for shape in link.shapes()] == [4e6, 20e6]
    # Another process sees it too.
    assert Lab.load(pair.name).link("a-b").shapes() == link.shapes()


def test_down_carries_nothing_and_up_carries_again(pair: Lab) -> None:
    link = pair.link("a-b")
    target = pair.address("b", "a-b")
    link.set(rate_bps=0, delay_s=0.001, jitter_s=0, loss=0, up=True)
    assert ping(pair, "a", target, count=3)[0] == 3
    for source in ("a", "b", None):
        link.set(up=False, source=source)
        assert ping(pair, "a", target, count=3)[0] == 0
        link.set(up=True)
        assert ping(pair, "a", target, count=3)[0] == 3


def test_loss_loses_its_share(pair: Lab) -> None:
    link = pair.link("a-b")
    link.set(rate_bps=0, delay_s=0, jitter_s=0, loss=0.3, source="a", up=True)
    link.set(loss=0, source="b")
    try:
        sent = 1000
        argv = ["ping", "-n", "-q", "-A", "-c", str(sent), "-W", "1", "-f", pair.address("b", "a-b")]
        said = pair.exec("a", argv, check=False, timeout=60).stdout
    finally:
        link.set(loss=0)
    answers = re.search(r"(\d+) received", said)
    assert answers
    # Six standard deviations of a binomial distribution.
    assert abs(sent - int(answers[1]) - 300) < 6 * (sent * 0.3 * 0.7) ** 0.5


def test_jitter_spreads_round_trips(pair: Lab) -> None:
    link = pair.link("a-b")
    link.set(rate_bps=0, delay_s=0.03, jitter_s=0.02, loss=0, source="a", up=True)
    link.set(delay_s=0, jitter_s=0, source="b")
    argv = ["ping", "-n", "-c", "40", "-i", "0.02", "-W", "1", pair.address("b", "a-b")]
    times = [float(found) for found in re.findall(r"time=([0-9.]+)", pair.exec("a", argv).stdout)]
    link.set(delay_s=0, jitter_s=0)
    assert len(times) == 40
    assert min(times) >= 9
    assert max(times) - min(times) > 10


def test_bad_values_change_nothing(pair: Lab) -> None:
    link = pair.link("a-b")
    before = link.shapes()
    with pytest.raises(UsageError):
        link.set(rate_bps=1)
    with pytest.raises(UsageError, match="joins a and b, not c"):
        link.set(rate_bps=1e6, source="c")
    with pytest.raises(UsageError, match="no link 'x'"):
        pair.link("x")
    assert link.shapes() == before


def test_relay_refuses_nonsense_and_lives(pair: Lab) -> None:
    path = state.load(pair.name).links["a-b"].socket
    for junk in (b"\n", b"{}x\n", b'{"a_to_b": {"rate_bps": 5}}\n', b'{"a_to_b": {"no": 5}}\n', b"[" * 70_000):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(path)
            try:
                client.sendall(junk)
                client.shutdown(socket.SHUT_WR)
                answer = client.recv(65536)
            except ConnectionError:
                answer = b""
            assert not answer or json.loads(answer)["error"]
    stats = pair.link("a-b").stats()
    assert stats is not None
    assert stats.a_to_b.pushed == stats.a_to_b.delivered + stats.a_to_b.lost + stats.a_to_b.dropped + stats.a_to_b.cut


def test_idle_link_carries_no_bytes_of_its_own(triangle: Lab) -> None:
    assert triangle.wire_bytes("oslo-lisbon-2") == (0, 0)


def test_several_links_between_two_sites_are_separate_paths(triangle: Lab) -> None:
    assert triangle.links_between("lisbon", "oslo") == ["oslo-lisbon", "oslo-lisbon-2"]
    first, second = (triangle.address("lisbon", name) for name in ("oslo-lisbon", "oslo-lisbon-2"))
    triangle.link("oslo-lisbon").set(up=False)
    try:
        assert ping(triangle, "oslo", first, count=2)[0] == 0
        assert ping(triangle, "oslo", second, count=2)[0] == 2
    finally:
        triangle.link("oslo-lisbon").set(up=True)
    assert ping(triangle, "oslo", first, count=2)[0] == 2


def test_sites_reach_each_others_own_addresses(triangle: Lab) -> None:
    for source in triangle.sites:
        for target in triangle.sites:
            assert ping(triangle, source, triangle.address(target), count=1)[0] == 1


def test_guest_is_reached_through_the_chosen_site_by_the_same_connection(triangle: Lab) -> None:
    """A "guest" (an address in a namespace behind the bridge) moves; a client's TCP connection still finds it."""
    for site in ("oslo", "lisbon"):
        guest = f"{triangle.name}-guest-{site}"
        triangle.exec(site, ["ip", "link", "add", "tap0", "type", "veth", "peer", "name", "eth0"])
        triangle.exec(site, ["ip", "link", "set", "tap0", "master", "br0", "up"])
        assert GATEWAY_MAC in triangle.exec(site, ["ip", "link", "show", "br0"]).stdout
        namespaces.run(["ip", "netns", "add", guest])
        triangle.exec(site, ["ip", "link", "set", "eth0", "netns", guest])
        namespaces.ip(
            guest,
            [
                "link set eth0 address 02:00:00:00:00:77",
                "addr add 10.77.0.10/24 dev eth0",
                "link set eth0 up",
                "route add default via 10.77.0.1",
            ],
        )
    try:
        for via, other in (("oslo", "lisbon"), ("lisbon", "oslo"), ("oslo", "lisbon")):
            triangle.route_guest("client", "10.77.0.10", via)
            here = triangle.exec("client", ["ip", "route", "get", "10.77.0.10"]).stdout
            assert f"via {triangle.address(via, f'client-{via}')}" in here
            assert f"src {triangle.address('client')}" in here
            before = triangle.wire_bytes(f"client-{other}")
            assert ping(triangle, "client", "10.77.0.10", count=2)[0] == 2
            assert triangle.wire_bytes(f"client-{other}") == before
        # Through a site on the way, and back to direct delivery there.
        triangle.exec("client", ["ip", "link", "set", "wan3", "down"])
        with pytest.raises(UsageError, match="no guest_gateway"):
            triangle.route_guest("oslo", "10.77.0.10", "client")
        with pytest.raises(UsageError, match="guest address"):
            triangle.route_guest("client", "10.77.0", "oslo")
    finally:
        for site in ("oslo", "lisbon"):
            namespaces.delete(f"{triangle.name}-guest-{site}")


def test_a_guest_can_be_reached_over_another_site_and_then_at_that_site() -> None:
    text = TRIANGLE[: TRIANGLE.rindex("[[link]]")].replace("t-tri", "t-line")
    with lab(text) as made:
        made.route_guest("client", "10.77.0.10", "lisbon")
        assert "dev wan0" in made.exec("oslo", ["ip", "route", "get", "10.77.0.10"]).stdout
        made.route_guest("client", "10.77.0.10", "oslo")
        assert "dev br0" in made.exec("oslo", ["ip", "route", "get", "10.77.0.10"]).stdout


def test_sockets_made_by_call_belong_to_the_site(pair: Lab) -> None:
    pair.link("a-b").set(rate_bps=0, delay_s=0, jitter_s=0, loss=0, up=True)
    here = os.stat("/proc/thread-self/ns/net").st_ino
    address = pair.address("b")

    def serve() -> socket.socket:
        return socket.create_server((address, 0))

    with pair.call("b", serve) as server:
        port = server.getsockname()[1]
        with pair.call("a", lambda: socket.create_connection((address, port), 10)) as client:
            peer, source = server.accept()
            with peer:
                client.sendall(b"hello")
                assert peer.recv(10) == b"hello"
            assert source[0] == pair.address("a")
    assert os.stat("/proc/thread-self/ns/net").st_ino == here
    with pytest.raises(ZeroDivisionError):
        pair.call("a", lambda: 1 / 0)


def test_exec_gives_output_and_says_what_failed(pair: Lab) -> None:
    assert pair.exec("a", ["cat"], given="words").stdout == "words"
    with pytest.raises(HaulierError, match=r"false in site a failed \(1\)"):
        pair.exec("a", ["false"])
    assert pair.exec("a", ["false"], check=False).returncode == 1
    with pytest.raises(HaulierError, match=r"did not end within 0.1 s"):
        pair.exec("a", ["sleep", "5"], timeout=0.1)
    with pytest.raises(UsageError, match="no site 'x'"):
        pair.exec("x", ["true"])


def test_nothing_is_left_after_down_and_a_second_down_is_fine() -> None:
    with lab(TRIANGLE) as made:
        assert left_of(made.name)
        sleeper = made.popen("oslo", ["sleep", "1000"])
        wait_for(lambda: sleeper.pid in namespaces.processes(made.namespace("oslo")))
        made.down()
        assert left_of(made.name) == []
        assert sleeper.wait(10) == -signal.SIGTERM
        take_down(made.name)
        with pytest.raises(UnknownThing, match="is not up"):
            Lab.load(made.name)
    assert left_of(made.name) == []


def test_down_ends_what_ignores_being_asked() -> None:
    with lab(PAIR) as made:
        argv = ["sh", "-c", 'trap "" TERM; echo ready; while :; do read x; done < /dev/zero']
        stubborn = made.popen("a", argv, stdout=subprocess.PIPE)
        assert stubborn.stdout is not None
        with stubborn.stdout:
            assert stubborn.stdout.readline() == b"ready\n"
        made.down()
        assert stubborn.wait(10) == -signal.SIGKILL


def test_up_twice_is_refused_and_force_starts_anew() -> None:
    text = own_name(PAIR)
    made = Lab.up(text)
    try:
        relay = state.load(made.name).links["a-b"].pid
        with pytest.raises(Conflict, match=f"take it down with `haulier lab down {made.name}`"):
            Lab.up(text)
        assert processes.started(relay)
        again = Lab.up(text, force=True)
        assert ping(again, "a", again.address("b"), count=1)[0] == 1
        assert processes.started(relay) is None
    finally:
        take_down(made.name)
    assert left_of(made.name) == []


def test_foreign_namespace_is_not_touched() -> None:
    text = own_name(PAIR)
    name = text.partition('"')[2].partition('"')[0]
    namespaces.run(["ip", "netns", "add", f"{name}-b"])
    try:
        with pytest.raises(Conflict, match=f"{name}-b exists already"):
            Lab.up(text)
        assert left_of(name) == [f"namespace {name}-b"]
        take_down(name)
        assert left_of(name) == [f"namespace {name}-b"]
        Lab.up(text, force=True).down()
    finally:
        namespaces.delete(f"{name}-b")
    assert left_of(name) == []


def test_two_labs_do_not_see_each_other() -> None:
    with lab(PAIR) as one, lab(PAIR) as two:
        two.link("a-b").set(up=False)
        assert ping(one, "a", one.address("b"), count=1)[0] == 1
        assert ping(two, "a", two.address("b"), count=1)[0] == 0
        two.down()
        assert ping(one, "a", one.address("b"), count=1)[0] == 1


def test_many_processes_use_labs_at_once() -> None:
    code = (
        "import sys; from tests.support.labs import lab\n"
        "with lab(sys.argv[1]) as made:\n"
        "    for n in range(5):\n"
        "        made.link('a-b').set(delay_s=n / 1000)\n"
        "        made.route_guest('b', '10.77.0.10', 'a')\n"
        "        made.exec('b', ['ping', '-c1', made.address('a')])\n"
        "print(made.name)\n"
    )
    text = PAIR.replace('name = "a"', 'name = "a"\nguest_gateway = "10.77.0.1/24"', 1)
    argv = [sys.executable, "-c", code, text]
    running = [
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        for _ in range(4)
    ]
    for process in running:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert left_of(out.strip()) == []


def test_killed_relay_is_noticed_and_down_still_works() -> None:
    with lab(PAIR, backend="tun") as made:
        link = made.link("a-b")
        relay = state.load(made.name).links["a-b"].pid
        assert link.alive()
        os.kill(relay, signal.SIGKILL)
        wait_for(lambda: not link.alive())
        with pytest.raises(PeerError, match="--force"):
            link.set(up=False)
        with pytest.raises(UnknownThing):
            made.wire_bytes("a-b")
        status = made.status()
        assert status["links"]["a-b"]["alive"] is False
    assert left_of(made.name) == []


KILLED_UP = """
import os, signal, sys
from haulier.lab import lab, namespaces, tun
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
def after(f):
    def wrapped(*a, **k):
        f(*a, **k)
        die()
    return wrapped
stage = sys.argv[1]
if stage == "first namespace": namespaces.add = after(namespaces.add)
if stage == "before links": lab._make_links = die
if stage == "relay launched": tun.launch = after(tun.launch)
if stage == "configuring": lab._configure = die
if stage == "done": lab._configure = after(lab._configure)
lab.Lab.up(sys.argv[2], backend="tun")
"""


@pytest.mark.parametrize("stage", ["first namespace", "before links", "relay launched", "configuring", "done"])
def test_killed_up_leaves_nothing_after_down(stage: str) -> None:
    text = own_name(PAIR)
    name = text.partition('"')[2].partition('"')[0]
    done = subprocess.run([sys.executable, "-c", KILLED_UP, stage, text], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert left_of(name)
    with pytest.raises(Conflict, match="left half way"):
        Lab.load(name)
    take_down(name)
    assert left_of(name) == []


def test_failing_up_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = own_name(TRIANGLE)
    name = text.partition('"')[2].partition('"')[0]

    def fail(namespace: str, lines: list[str]) -> None:
        raise HaulierError("the third site cannot be set up")

    monkeypatch.setattr("haulier.lab.lab.namespaces.ip", fail)
    with pytest.raises(HaulierError, match="third site"):
        Lab.up(text, backend="tun")
    assert left_of(name) == []


def test_unreadable_state_is_explained_and_a_newer_one_can_still_be_taken_down() -> None:
    with lab(PAIR) as made:
        file = state.path(made.name)
        text = file.read_text()
        file.write_text("{")
        with pytest.raises(HaulierError, match="does not say which namespaces"):
            made.down()
        assert left_of(made.name)
        file.write_text(text.replace('"version": 1', '"version": 99'))
        with pytest.raises(HaulierError, match="version 99"):
            Lab.load(made.name)
        made.down()
        assert left_of(made.name) == []


def test_kernel_back_end_with_its_rate_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where netem is missing, its place is taken by a queue that does nothing: pair, tbf, counters are still real."""
    genuine = netem.commands

    def without_netem(interface: str, shape: object, mtu: int) -> list[list[str]]:
        root, child = genuine(interface, shape, mtu)  # type: ignore[arg-type]
        assert root[:6] == ["qdisc", "replace", "dev", interface, "root", "handle"]
        return [[*root[:6], "1:", *["tbf", "rate", "10gbit", "burst", "1mb", "limit", "100mb"]], child]

    if not netem.available():
        monkeypatch.setattr(netem, "commands", without_netem)
        monkeypatch.setattr(netem, "available", lambda: True)
    with lab(PAIR, backend="netem") as made:
        assert made.backend == "netem"
        link = made.link("a-b")
        link.set(rate_bps=10e6)
        before = made.wire_bytes("a-b")
        goodput = iperf(made, "b", "a", made.address("b", "a-b"), 2)
        assert 6 <= goodput <= 9.8
        assert made.wire_bytes("a-b")[0] - before[0] >= goodput * 1e6 / 8 * 2 * 0.95
        # To no limit and back: another kind of queue under the same parent.
        link.set(rate_bps=0)
        link.set(rate_bps=2e6, source="a")
        assert 1 <= iperf(made, "b", "a", made.address("b", "a-b"), 2) <= 2.1
        assert link.stats() is None
        assert link.alive()
    assert left_of(made.name) == []


def test_topologies_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(PAIR + 'rate = "fast"\n')
    before = sorted(namespaces.RUN_NETNS.iterdir())
    with pytest.raises(UsageError, match="rate = 'fast'"):
        Lab.up(file)
    with pytest.raises(UsageError, match="back end 'magic'"):
        Lab.up(PAIR, backend="magic")
    assert sorted(namespaces.RUN_NETNS.iterdir()) == before


def test_ipv6_crosses_the_link_where_it_is_asked_for() -> None:
    with lab("ipv6 = true\n" + PAIR.lstrip() + 'rate = "10mbit"\ndelay = "5ms"') as made:
        for target in (made.address6("b"), made.address6("b", "a-b")):
            said = made.exec("a", ["ping", "-6", "-c", "2", "-i", "0.2", target]).stdout
            times = [float(found) for found in re.findall(r"time=([0-9.]+)", said)]
            assert len(times) == 2 and min(times) > 9, said
        crossed = made.wire_bytes("a-b")[0]
        assert crossed > 4 * 104
    with lab(PAIR) as made, pytest.raises(UsageError, match="no IPv6"):
        made.address6("b")
