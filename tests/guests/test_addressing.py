"""A guest's addresses under MPTCP: what is told to it, and what is read from it. (With a real guest: tests/system.)"""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import subprocess
from pathlib import Path
from typing import IO, Any

import pytest

from haulier.errors import GuestError, Unsupported
from haulier.guests import addressing
from haulier.guests.agent import Finished
from tests.support.waiting import wait_for

# As Debian 12's guest prints them (iproute2 6.1, kernel 6.1).
LISTENERS = """enabled 1
tool
listen LISTEN 0      9      0.0.0.0:7100 0.0.0.0:* cubic cwnd:10 tcp-ulp-mptcp
listen LISTEN 0      128    0.0.0.0:22   0.0.0.0:* cubic cwnd:10
listen LISTEN 0      128    127.0.0.1:25 0.0.0.0:* cubic cwnd:10
listen LISTEN 0      128       [::]:22      [::]:* cubic cwnd:10
"""
SOCKETS = (
    "0 0 10.78.1.21:7100 10.90.0.3:40000 cubic rto:204 tcp-ulp-mptcp flags:Mec "
    "token:0000(id:0)/9fd4cb75(id:0) seq:c1 sfseq:1 ssnoff:1 maplen:8\n"
    "0 0 [::ffff:10.78.2.21]:7100 10.90.0.3:40002 cubic tcp-ulp-mptcp flags:Jjec "
    "token:1(id:0)/9fd4cb75(id:3) seq:1\n"
    "0 0 10.78.1.21:7100 10.90.0.3:40004 cubic tcp-ulp-mptcp flags:Mec token:0(id:0)/77(id:0)\n"
    "0 0 [fe80::1%eth0]:22 [fe80::2]:5 cubic rto:204\n"
    "0 36 10.78.1.21:22 10.90.0.3:40006 cubic rto:204\n"
)


def test_a_guest_is_able_by_kernel_and_tool_and_its_listeners_are_told_apart() -> None:
    found = addressing.ability(LISTENERS)
    assert found == addressing.Ability(True, True, (7100,), (22,)) and found.problems() == []
    assert "ports 22" in found.remarks()[0]
    bare = addressing.ability("enabled absent\n")
    assert len(bare.problems()) == 2 and bare.remarks() == []
    odd = addressing.ability(f"listen LISTEN 0 1 *:² *:*\nlisten LISTEN 0 1 *:{'1' * 5000} *:*\n")
    assert (odd.mptcp_ports, odd.plain_ports) == ((), ()), "a guest may print anything"
    assert "mptcpize" in addressing.ability("enabled 1\ntool\nlisten LISTEN 0 1 *:80 *:*\n").remarks()[0]


def test_connections_are_counted_by_address_and_token() -> None:
    found = addressing.connections(SOCKETS + "nonsense\n")
    assert found.tokens == {"10.78.1.21": {"9fd4cb75", "77"}, "10.78.2.21": {"9fd4cb75"}}
    assert found.plain == {"fe80::1": 1, "10.78.1.21": 1}
    assert found.without("10.78.1.21", "10.78.2.21") == 1, "one has not joined yet"
    assert found.without("10.78.2.21", "10.78.1.21") == 0


def test_a_stay_has_another_number_than_the_one_before() -> None:
    numbers = [addressing.number_of(epoch) for epoch in range(600)]
    assert all(a != b for a, b in itertools.pairwise(numbers)) and set(numbers) == set(range(1, 251))


def test_lines_for_both_families() -> None:
    assert addressing.take_lines("eth0", "10.78.2.21")[0] == "addr replace 10.78.2.21/32 dev eth0"
    six = addressing.take_lines("eth0", "fd78::21", "fe80::1")
    assert six[0].endswith("/128 dev eth0 nodad") and six[1] == "route replace default via fe80::1 dev eth0"
    assert addressing.join_lines("eth0", "10.78.2.21", 3, backup=True)[0].endswith("id 3 dev eth0 signal backup")
    assert addressing.leave_lines("eth0", "10.78.1.21", [7]) == [
        "mptcp endpoint delete id 0 10.78.1.21",
        "mptcp endpoint delete id 7",
    ]
    once = addressing.again_lines("eth0", "10.78.2.21", [5], 4)
    assert once[:2] == ["mptcp endpoint delete id 5", "mptcp endpoint add 10.78.2.21 id 67 dev eth0 signal"]
    assert addressing.again_lines("eth0", "10.78.2.21", [67], 4)[1].endswith("id 5 dev eth0 signal")
    shown = "10.78.1.10 id 3 signal dev eth0 \nadd_addr_accepted 0 subflows 8 \nfd78::1 id 4 signal backup\n"
    shown += "fd79::1 id ² signal\n"
    assert addressing.endpoints(shown) == {"10.78.1.10": [3], "fd78::1": [4]}


class Agent:
    """Answers as a guest would."""

    def __init__(self, out: str = "", interfaces: Any = None) -> None:
        self.out, self.interfaces = out, interfaces

    def execute(self, command: str) -> Any:
        assert command == "guest-network-get-interfaces"
        return self.interfaces

    def run(self, command: list[str], input: bytes = b"", timeout: float = 0) -> Finished:
        return Finished(0, self.out.encode(), b"")


def test_the_nic_is_found_by_its_mac_and_its_name_is_not_trusted() -> None:
    mine = {"name": "eth0", "hardware-address": "52:54:00:12:34:56"}
    assert addressing.nic_of(Agent(interfaces=[{"name": "lo"}, mine]), "52:54:00:12:34:56") == "eth0"  # type: ignore[arg-type]
    for wrong in (
        None,
        [],
        [1, None, mine | {"name": 1}],
        [mine | {"name": "eth0\naddr flush dev eth0"}],
        [mine | {"hardware-address": "x"}],
    ):
        with pytest.raises(GuestError, match="no network interface"):
            addressing.nic_of(Agent(interfaces=wrong), "52:54:00:12:34:56")  # type: ignore[arg-type]


def test_a_guest_that_is_not_able_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"no MPTCP.*ip mptcp"):
        addressing.check(Agent("enabled 0\n"))  # type: ignore[arg-type]


class Shell:
    """Runs what is armed with the shell itself, a pipe in place of the kernel's events, an `ip` that takes notes."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path
        self.started: list[subprocess.Popen[bytes]] = []
        self.events: list[IO[str]] = []
        program = tmp_path / "ip"
        program.write_text(f"#!/bin/sh\ncat >>{tmp_path}/done\n")
        program.chmod(0o755)

    def execute(self, command: str, args: dict[str, Any]) -> Any:
        script = args["arg"][1].replace("PATH=", f"PATH={self.path}:", 1).replace("/run/", f"{self.path}/")
        for folder in ("ipv4", "mptcp"):
            script = script.replace(f"/proc/sys/net/{folder}/", f"{self.path}/")
        fifo = self.path / f"events-{len(self.started)}"
        os.mkfifo(fifo)
        script = script.replace('timeout 900 ip -o monitor link dev "$0"', f"cat {fifo}", 1)
        process = subprocess.Popen([args["path"], "-c", script, *args["arg"][2:]], stdin=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(base64.b64decode(args["input-data"]))
        process.stdin.close()
        self.started.append(process)
        self.events.append(fifo.open("w"))
        return {"pid": process.pid}

    def run(self, command: list[str], timeout: float = 0) -> Finished:
        (self.path / "haulier-arrival").unlink(missing_ok=True)
        return Finished(0, b"", b"")

    def happens(self, watcher: int, event: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.events[watcher].write(f"2: eth0: <BROADCAST,UP> mtu 1500 event {event}\n")
            self.events[watcher].flush()

    def ends(self, watcher: int) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.events[watcher].close()
        assert self.started[watcher].wait(20) in (0, 1)

    def done(self) -> str:
        for number in range(len(self.started)):
            self.ends(number)
        file = self.path / "done"
        return file.read_text() if file.exists() else ""


def test_what_is_armed_is_run_once_on_arrival_and_on_nothing_else(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    addressing.arm(shell, "eth0", ["addr replace 10.78.2.21/32 dev eth0", "mptcp limits set subflows 8"])  # type: ignore[arg-type]
    shell.happens(0, "FEATURE CHANGE")
    shell.happens(0, "NOTIFY PEERS")
    shell.happens(0, "NOTIFY PEERS")
    assert shell.done() == "addr replace 10.78.2.21/32 dev eth0\nmptcp limits set subflows 8\n"


@pytest.mark.parametrize(
    ("before", "after"), [("4096\t131072\t6291456\n", "4096 1048576 6291456\n"), ("4096 2097152 6291456\n", None)]
)
def test_a_guest_has_room_for_what_subflows_that_join_late_bring(
    tmp_path: Path, before: str, after: str | None
) -> None:
    setting = tmp_path / "tcp_rmem"
    setting.write_text(before)
    shell = Shell(tmp_path)
    addressing.arm(shell, "eth0", ["one"])  # type: ignore[arg-type]
    shell.happens(0, "NOTIFY PEERS")
    assert shell.done() == "one\n"
    assert setting.read_text() == (after or before)


@pytest.mark.parametrize(("before", "after"), [("120\n", "1\n"), ("30\n", "30\n"), ("0\n", "0\n"), (None, None)])
def test_a_guest_soon_announces_again_what_was_lost(tmp_path: Path, before: str | None, after: str | None) -> None:
    setting = tmp_path / "add_addr_timeout"
    if before is not None:
        setting.write_text(before)
    shell = Shell(tmp_path)
    addressing.arm(shell, "eth0", ["one"])  # type: ignore[arg-type]
    shell.happens(0, "NOTIFY PEERS")
    assert shell.done() == "one\n"
    assert (setting.read_text() if setting.exists() else None) == after


def test_what_was_armed_before_or_disarmed_is_not_run(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    addressing.arm(shell, "eth0", ["first"])  # type: ignore[arg-type]
    file = tmp_path / "haulier-arrival"
    first = wait_for(lambda: file.read_text() if file.exists() else "", 10, "the first one")
    addressing.arm(shell, "eth0", ["second"])  # type: ignore[arg-type]
    wait_for(lambda: file.read_text() not in ("", first), 10, "the second one")
    shell.happens(0, "NOTIFY PEERS")
    shell.ends(0)
    addressing.disarm(shell)  # type: ignore[arg-type]
    shell.happens(1, "NOTIFY PEERS")
    assert shell.done() == ""
