"""Connections of other processes are found, and asked to speak to their peers without any harm to them."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import haulier
from haulier.containers.sockets import borrowed, probe, talking, unreachable

pytestmark = pytest.mark.root
ECHO = (
    "import socket,sys\n"
    "s=socket.create_server(('127.0.0.1',0));print(s.getsockname()[1],flush=True)\n"
    "c=s.accept()[0];c.setsockopt(1,2,1)\n"
    "u=socket.socket(socket.AF_UNIX);d=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
    "print('there',flush=True)\n"
    "while data:=c.recv(100): c.sendall(data)\n"
)
SERVE = """
import socket, subprocess, sys

def run(words):
    subprocess.run(["ip", *words.split()], check=True)

print("there", flush=True)
sys.stdin.readline()
run("link set inside up")
run("addr add 10.9.9.1/24 dev inside")
listener = socket.create_server(("10.9.9.1", 7000))
print("listens", flush=True)
accepted, _ = listener.accept()
listener.close()
sys.stdin.readline()
# From now on nothing that comes is for this host.
with open("/proc/sys/net/ipv4/ip_early_demux", "w") as file:
    file.write("0")
run("addr del 10.9.9.1/24 dev inside")
run("addr add 10.9.9.3/24 dev inside")
print("deaf", flush=True)
sys.stdin.readline()
"""
LOST = """
import socket, subprocess, sys, time
from haulier.containers import sockets

def run(words):
    subprocess.run(["ip", *words.split()], check=True)

def backoff(sock):
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 5)[4]

run("link set lo up")
pipe = subprocess.PIPE
words = ["unshare", "--net", sys.executable, "-c", sys.argv[1]]
with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, bufsize=1) as other:
    assert other.stdout.readline() == "there\\n"
    run(f"link add outside type veth peer name inside netns {other.pid}")
    run("link set outside up")
    run("addr add 10.9.9.2/24 dev outside")
    other.stdin.write("go on\\n")
    assert other.stdout.readline() == "listens\\n"
    client = socket.create_connection(("10.9.9.1", 7000), timeout=10)
    # Found once, it is not looked for again.
    words = ["ip", "neigh", "show", "10.9.9.1"]
    known = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    run(f"neigh replace 10.9.9.1 dev outside lladdr {known[known.index('lladdr') + 1]} nud permanent")
    other.stdin.write("go on\\n")
    assert other.stdout.readline() == "deaf\\n"
    client.sendall(b"lost")
    deadline = time.monotonic() + 30
    while backoff(client) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = backoff(client)
    assert sockets.probe([other.pid]) == 1
    print(before, backoff(client))
    other.stdin.write("end\\n")
"""


@pytest.fixture
def echo() -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    with subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        with socket.create_connection(("127.0.0.1", int(process.stdout.readline())), timeout=10) as client:
            assert process.stdout.readline() == "there\n"
            yield process, client
        process.wait(10)


def test_established_connections_are_found(echo: tuple[subprocess.Popen[str], socket.socket]) -> None:
    process, client = echo
    ((pid, number),) = talking([process.pid])
    assert pid == process.pid
    with borrowed(pid, number) as sock:
        assert sock.getpeername() == client.getsockname()
    assert talking([]) == []


def test_a_probe_changes_nothing_for_either_side(echo: tuple[subprocess.Popen[str], socket.socket]) -> None:
    process, client = echo
    for number in range(3):
        assert probe([process.pid]) == 1
        client.sendall(b"hello %d" % number)
        assert client.recv(100) == b"hello %d" % number
    with borrowed(*talking([process.pid])[0]) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 1


def test_a_peer_that_waits_long_takes_its_timer_back() -> None:
    # Its packets are lost all the while, so that nothing else makes its timer shorter.
    environment = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "PYTHONPATH": str(Path(haulier.__file__).parents[1])}
    words = ["unshare", "--net", sys.executable, "-c", LOST, SERVE]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before >= 3
    assert after < before


def test_the_message_of_a_host_that_cannot_be_reached() -> None:
    message = unreachable(("192.0.2.1", 4660), ("192.0.2.2", 80), 0xFFFF0001)
    kind, code, quoted = message[0], message[1], message[8:]
    assert (kind, code, len(message)) == (3, 1, 36)
    assert quoted[12:20] == bytes([192, 0, 2, 1, 192, 0, 2, 2])
    assert quoted[20:] == bytes.fromhex("1234 0050 ffff0001")
    for part in (message, quoted[:20]):
        assert sum(int.from_bytes(part[at : at + 2], "big") for at in range(0, len(part), 2)) % 0xFFFF == 0
